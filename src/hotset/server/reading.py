"""Reads an HTTP request: its body, within bounds, and the tenant that sent it."""

from typing import Any

from starlette.requests import Request
from starlette.types import Receive

from hotset.errors import RequestError
from hotset.foreign_text import ForeignTextError, parse_json
from hotset.server.body import Body, parse_body
from hotset.server.errors import too_large
from hotset.server.keys import Tenant
from hotset.server.limits import Limits


def tenant_of(request: Request) -> Tenant:
    """Who sent it."""
    tenant: Tenant = request.scope["tenant"]
    return tenant


async def read_body(kind: type[Body], request: Request, limits: Limits) -> Body:
    """The JSON body, checked.

    Raises:
        ApiError: it is too long (413); RequestError: it is no JSON, or not of that kind.
    """
    return parse_body(kind, await read_json(request, limits.max_body_bytes))


async def read_json(request: Request, most: int) -> Any:
    """The body as JSON, of `most` bytes at most.

    Raises:
        ApiError: it is longer (413); RequestError: it is no JSON.
    """
    try:
        return parse_json(await read_bytes(request, most), check_unicode=True)
    except ForeignTextError as error:
        raise RequestError(f"the body {error}", code="invalid_json") from error


async def read_bytes(request: Request, most: int) -> bytearray:
    """The body. Raises ApiError (413): it is longer than `most` bytes."""
    too_long = too_large("body", most)
    if int(request.headers.get("content-length") or 0) > most:
        raise too_long
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > most:
            raise too_long
    return content


def bounded(receive: Receive, most: int) -> Receive:
    """Receive no more than `most` bytes of a body. Raises ApiError (413)."""
    seen = 0

    async def bounded() -> Any:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise too_large("file", most)
        return message

    return bounded
