"""Errors that reach users. A message is one line: what was wrong, what was expected, what to do."""


class HotsetError(Exception):
    """Base of all errors raised for a user to read."""


class ConfigError(HotsetError):
    """An option, a budget or a file that cannot work as given."""


class ModelError(HotsetError):
    """A model that cannot be found, loaded or run."""


class RequestError(HotsetError):
    """One request that cannot be served as asked. Other requests are not touched.

    Attributes:
        param: the field at fault, as its sender named it; None where there is no single one.
        code: the kind of fault, for programs, by the OpenAI API's names where it has one.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str = "invalid_value"
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class PlanError(HotsetError):
    """A plan that cannot be made from the model, hardware and layout given."""


class OutOfBlocksError(HotsetError):
    """More KV blocks were asked for than are available. The pool is unchanged."""


class TierError(HotsetError):
    """A tier that cannot be opened or used."""


class ExpertReadError(HotsetError):
    """An expert that a step needs cannot be read. The requests of that step end with it."""


class EngineError(HotsetError):
    """The engine has failed or was closed. It serves no more requests."""


class DrainingError(EngineError):
    """The engine takes no more requests, as it is about to end. Nothing was queued."""


class OverloadedError(HotsetError):
    """More is asked for than may wait. Nothing was queued; the same request may work later.

    Attributes:
        retry_after_s: when to try again, in whole seconds.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message, retry_after_s)  # both, so that it can be pickled
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])
