"""What an HTTP request can be refused with, beyond `RequestError` (400)."""

from hotset.errors import HotsetError


class ApiError(HotsetError):
    """A refusal with a status of its own.

    Attributes:
        status: of the HTTP response.
        kind: the `type` of the OpenAI API's error.
        code: its `code`, or None.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.headers = headers or {}


def too_many(message: str, retry_after_s: float) -> ApiError:
    """429: the same request may work after `retry_after_s`."""
    return ApiError(
        429,
        message,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(max(1, round(retry_after_s)))},
    )
