"""Every HTTP request passes here: an id, a key, a log line, and errors that tell no secret."""

import asyncio
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

# What every client may see, with keys or without: these hold nothing of prompts and answers.
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
        app: answers; it finds its `Tenant` in the scope's `tenant`, and puts facts for the log into
            the scope's `facts`.
        keys: who may ask; without keys every client may.
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
        self._no_tenant = Tenant()
        self._tracer = tracer
        self.counts = HttpCounts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        token = logs.request_id.set(exchange.request_id)
        self.counts.open += 1
        try:
            try:
                scope["tenant"] = self._tenant(scope["path"], exchange.headers)
                scope["facts"] = exchange.facts
                await self._app(scope, receive, exchange.send)
            except (ClientDisconnect, asyncio.CancelledError):  # or it reads nothing any more
                exchange.status = _CLOSED_BY_CLIENT
            except Exception as error:
                await exchange.refuse(error, receive)
        finally:
            self.counts.open -= 1
            self._note(exchange)
            logs.request_id.reset(token)

    def _note(self, exchange: "_Exchange") -> None:
        """Count, log and trace a request that has ended."""
        scope, status, facts = exchange.scope, exchange.status, exchange.facts
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if route != "other" else "other"
        self.counts.requests[method, route, status or 0] += 1
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(1e3 * (time.monotonic() - exchange.start_s), 1),
            **facts,
        }
        if (tenant := scope.get("tenant")) and tenant.name:
            fields["key"] = tenant.name
        is_quiet = scope["path"] in _QUIET_PATHS and (status or 500) < 500
        _log.log(logging.DEBUG if is_quiet else logging.INFO, "request", extra={"fields": fields})
        if self._tracer is not None and facts:
            self._tracer.record(
                exchange.headers, route, exchange.request_id, exchange.start_ns, status or 0, facts
            )

    def _tenant(self, path: str, headers: dict[bytes, bytes]) -> Tenant:
        """Who asks. Raises ApiError where no key allows it."""
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
            return self._no_tenant
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        # Clients of Anthropic's API send it in a header of its own.
        return self._keys.find(key or headers.get(b"x-api-key", b"").decode("latin-1"))


class _Exchange:
    """One request and the status of its answer, which stays None until an answer begins."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.start_s, self.start_ns = time.monotonic(), time.time_ns()
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        client_id = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = client_id if _CLIENT_ID.fullmatch(client_id) else uuid.uuid4().hex
        self.facts: Facts = {}
        self.status: int | None = None
        self._send = send
        self._is_messages = is_messages_path(scope["path"])

    async def send(self, message: Message) -> None:
        """Send a part of the answer, whose head gets the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            request_id = self.request_id.encode()
            message["headers"] = [
                *message["headers"],
                (b"x-request-id", request_id),
                (b"x-content-type-options", b"nosniff"),
            ]
            if self._is_messages:  # where clients of that API look for it
                message["headers"].append((b"request-id", request_id))
        await self._send(message)

    async def refuse(self, error: Exception, receive: Receive) -> None:
        """Answer with an error, unless an answer has begun: the client sees that it was cut off."""
        refused = _api_error(error, self.request_id)
        if refused.status >= 500 and not isinstance(error, HotsetError):
            _log.exception("a request failed")
        if self.status is not None:
            return
        status, body = refused.status, refused.body()
        if self._is_messages:
            status, body = messages_error(refused, self.request_id)
        await JSONResponse(body, status, refused.headers)(self.scope, receive, self.send)


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
