"""Refusals of HTTP requests, and how the OpenAI API writes them."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from hotset.errors import EngineError, HotsetError, OverloadedError, RequestError
from hotset.request import NOT_AVAILABLE, FinishReason


class ApiError(HotsetError):
    """A refusal with a status of its own.

    Attributes:
        status: of the HTTP response.
        kind: the `type` of the OpenAI API's error.
        code: its `code`, or None.
        param: the field at fault, or None.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error as the OpenAI API reports it."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


@contextlib.contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Name the field of another API that a refused field of a chat came from."""
    try:
        yield
    except RequestError as error:
        message = str(error)
        for old, new in names.items():
            if error.param == old or message.startswith(f"{old} "):
                error.param = new
                error.args = (message.replace(old, new, 1) if message.startswith(old) else message,)
                break
        raise


def too_many(message: str, retry_after_s: float) -> ApiError:
    """429: the same request may work after `retry_after_s`."""
    return ApiError(
        429,
        message,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(max(1, round(retry_after_s)))},
    )


def not_found(message: str) -> ApiError:
    """404."""
    return ApiError(404, message, code="not_found")


def too_large(what: str, most_bytes: int) -> ApiError:
    """413."""
    message = f"the {what} is larger than the {most_bytes} bytes that are allowed"
    return ApiError(413, message, code="request_too_large")


def ended_early(
    reason: FinishReason, error: str | None, code: str | None = None
) -> ApiError | None:
    """The error for an output that did not come to its end; None where it did."""
    if reason is FinishReason.ERROR:
        message = error or "the model step failed"
        if code == NOT_AVAILABLE:
            return as_api_error(EngineError(message))
        return ApiError(500, message, kind="server_error", code=code or "step_failed")
    if reason is FinishReason.ABORT and error is not None:
        return ApiError(504, error, kind="timeout_error", code="request_timeout")
    if reason is FinishReason.ABORT:
        return as_api_error(EngineError("the request was stopped: the server is shutting down"))
    return None


def as_api_error(error: HotsetError) -> ApiError:
    """The refusal that a client gets for an error that is meant for it."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, RequestError):
        return ApiError(400, message, code=error.code, param=error.param)
    if isinstance(error, OverloadedError):
        headers = {"Retry-After": str(error.retry_after_s)}
        return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, EngineError):
        headers = {"Retry-After": "1"}
        kind = "server_error"
        return ApiError(503, message, kind=kind, code="not_available", headers=headers)
    return ApiError(400, message, code="invalid_value")
