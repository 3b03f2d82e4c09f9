"""Errors as the Anthropic Messages API says them."""

from typing import Any

from hotset.server.errors import ApiError

_OVERLOADED = 529
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
    504: "timeout_error",
    _OVERLOADED: "overloaded_error",
}


def is_messages_path(path: str) -> bool:
    """Whether a path is of the Messages API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def messages_error(error: ApiError, request_id: str | None = None) -> tuple[int, dict[str, Any]]:
    """The status and the body that say `error`."""
    status, message = error.status, str(error)
    if error.code == "queue_full":  # not a limit of the key's
        status = _OVERLOADED
    if error.code == "context_length_exceeded":  # what clients shorten their history by
        message = f"prompt is too long: {message}"
    kind = _KINDS.get(status, "invalid_request_error")
    body = {"type": "error", "error": {"type": kind, "message": message}}
    return status, body if request_id is None else {**body, "request_id": request_id}
