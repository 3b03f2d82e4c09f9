"""What every HTTP request passes: an id, a key, a log line, and errors that tell no secret."""

import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hotset.errors import HotsetError
from hotset.server import logs
from hotset.server.errors import ApiError, as_api_error
from hotset.server.generate import Facts
from hotset.server.keys import Keys, Tenant
from hotset.server.messages_error import is_messages_path, messages_error
from hotset.server.tracing import Tracer

_log = logging.getLogger("hotset.access")

# What anybody may see, with keys or without: nothing of what is asked or answered is there.
OPEN_PATHS = frozenset({"/", "/health", "/version", "/docs", "/openapi.json", "/favicon.ico"})
_QUIET_PATHS = frozenset({"/health", "/metrics", "/status.json", "/favicon.ico"})
_CLIENT_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_CLOSED_BY_CLIENT = 499


@dataclass(slots=True)
class HttpCounts:
    """Requests by method, route and status."""

    requests: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    open: int = 0


class Gate:
    """The outermost part of the server.

    Args:
        app: what answers; it finds its `Tenant` in the scope's `tenant`, and puts what the log
            should say into its `facts`.
        keys: who may ask; empty is anybody.
        host_names: names a request may call this server by, or any: where there are no keys, a
            page in a local browser could otherwise reach it by a name of its own (DNS rebinding).
        tracer: gets a span of each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        host_names: Collection[str] | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._host_names = host_names
        self._anybody = Tenant()
        self._tracer = tracer
        self.counts = HttpCounts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s, start_ns = time.monotonic(), time.time_ns()
        headers = dict(scope["headers"])
        client_id = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = client_id if _CLIENT_ID.fullmatch(client_id) else uuid.uuid4().hex
        token = logs.request_id.set(request_id)
        facts: Facts = {}
        status: int | None = None
        is_messages = is_messages_path(scope["path"])

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
                if is_messages:  # where clients of that API look for it
                    message["headers"].append((b"request-id", request_id.encode()))
            await send(message)

        self.counts.open += 1
        try:
            try:
                scope["tenant"] = self._tenant(scope["path"], headers)
                scope["facts"] = facts
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                status = _CLOSED_BY_CLIENT
            except Exception as error:
                refused = _api_error(error, request_id)
                if refused.status >= 500 and not isinstance(error, HotsetError):
                    _log.exception("a request failed")
                if status is None:  # otherwise the client sees that its answer was cut off
                    status_code, body = refused.status, refused.body()
                    if is_messages:
                        status_code, body = messages_error(refused, request_id)
                    response = JSONResponse(body, status_code, refused.headers)
                    await response(scope, receive, send_with_id)
        finally:
            self.counts.open -= 1
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if route != "other" else "other"
            self.counts.requests[method, route, status or 0] += 1
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(1e3 * (time.monotonic() - start_s), 1),
                **facts,
            }
            if tenant := scope.get("tenant"):
                fields["key"] = tenant.name
            is_quiet = scope["path"] in _QUIET_PATHS and (status or 500) < 500
            _log.log(
                logging.DEBUG if is_quiet else logging.INFO, "request", extra={"fields": fields}
            )
            if self._tracer is not None and facts:
                self._tracer.record(headers, route, request_id, start_ns, status or 0, facts)
            logs.request_id.reset(token)

    def _tenant(self, path: str, headers: dict[bytes, bytes]) -> Tenant:
        """Who asks. Raises ApiError: nobody that may."""
        if self._host_names is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host[: host.rindex("]") + 1] if "]" in host else host.partition(":")[0]
            if name not in self._host_names:
                message = (
                    f"this server is not called {name!r}: without API keys it takes requests "
                    "for the local machine only"
                )
                raise ApiError(403, message, code="wrong_host")
        if not len(self._keys) or path in OPEN_PATHS:
            return self._anybody
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        # Clients of Anthropic's API send it in a header of its own.
        return self._keys.find(key or headers.get(b"x-api-key", b"").decode("latin-1"))


def _api_error(error: Exception, request_id: str) -> ApiError:
    """What a client may know of an error."""
    if isinstance(error, HotsetError):
        return as_api_error(error)
    if isinstance(error, HTTPException):  # the router's: all others are caught where they arise
        headers = dict(error.headers or {})
        allowed = headers.get("Allow", "another method")
        code, message = "method_not_allowed", f"the method is not taken here; expected {allowed}"
        return ApiError(error.status_code, message, code=code, headers=headers)
    message = f"internal error; the server's log has more under request id {request_id}"
    return ApiError(500, message, kind="server_error", code="internal_error")
