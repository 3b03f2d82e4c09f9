"""The desk of a fleet: one process has files, batches, stored responses and the limits of keys.

`DeskEntry` is the desk's side, `Desk` a front's: it passes requests for files and batches on as
they came, with the client's key, and asks for leases of limits. Responses that are stored go to the
desk too, so that each front finds those of the others.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Literal

import httpx
import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hotset.clock import REAL_CLOCK
from hotset.errors import EngineError, RequestError
from hotset.fleet.address import Address
from hotset.fleet.allowance import KeyShare
from hotset.fleet.leases import ASK_EVERY_S, Answer, Ask, FrontLeases, Ledger
from hotset.server import logs
from hotset.server.body import Json
from hotset.server.errors import ApiError, not_found
from hotset.server.keys import Tenant
from hotset.server.reading import read_bytes
from hotset.server.response_store import ResponseStore, StoredResponse

_log = logging.getLogger(__name__)

_LEASES, _RESPONSES = "/leases", "/stored-responses"
_ANSWER_S = 1.0  # a desk that answers later counts as gone
_AGAIN_S = 0.1  # how soon a key that got nothing may ask again
_STORE_S = 10.0  # a large response, at most
_READ_S = 600.0  # of a large file, between two parts
_MOST_ASK_BYTES = 4 << 20
_NO_ANSWER = (
    "the desk of this fleet, which has files, batches and stored responses, does not answer; try "
    "again soon"
)
_PASSED_ON = ("authorization", "x-api-key", "content-type", "content-length", "accept")
_PASSED_BACK = ("content-type", "content-length", "content-disposition", "retry-after", "etag")


def desk_token(secret: bytes) -> str:
    """What a front shows to have leases: that it holds the fleet's secret."""
    return hmac.new(secret, b"hotset desk", hashlib.sha256).hexdigest()


class _Asked(msgspec.Struct):
    """What a front asks for a response of a tenant whose key it has checked."""

    do: Literal["put", "get", "delete"]
    tenant: str
    response_id: str
    response: Json = {}
    items: list[Json] = []


class _Found(msgspec.Struct):
    """What the desk has of it."""

    response: Json = {}
    items: list[Json] = []
    is_stored: bool = False


class DeskEntry:
    """The desk's ASGI application: what fronts ask for, and all that `api` answers.

    Args:
        api: has files and batches.
        ledger: has the limits of all keys.
        responses: that fronts store.
        secret: the fleet's.
    """

    def __init__(
        self, api: ASGIApp, ledger: Ledger, responses: ResponseStore, secret: bytes
    ) -> None:
        self._api = api
        self._ledger, self._responses = ledger, responses
        self._authorization = f"Bearer {desk_token(secret)}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        answers = {_LEASES: self._lease, _RESPONSES: self._response}
        answer = answers.get(scope["path"]) if scope["type"] == "http" else None
        if answer is None:
            await self._api(scope, receive, send)
            return
        request = Request(scope, receive)
        given = request.headers.get("authorization", "")
        response = Response("the fleet secret is another one", 401)
        if hmac.compare_digest(given.encode(), self._authorization.encode()):
            try:
                response = Response(await answer(request), media_type="application/json")
            except ApiError as error:
                response = Response(str(error), error.status)
            except (RequestError, msgspec.MsgspecError) as error:
                response = Response(str(error), 400)
        await response(scope, receive, send)

    async def _lease(self, request: Request) -> bytes:
        body = await read_bytes(request, _MOST_ASK_BYTES)
        return msgspec.json.encode(self._ledger.answer(msgspec.json.decode(body, type=Ask)))

    async def _response(self, request: Request) -> bytes:
        """Store, find or delete one."""
        body = await read_bytes(request, self._responses.most_frame_bytes)
        asked = msgspec.json.decode(body, type=_Asked)
        found = _Found()
        if asked.do == "put":
            found.is_stored = await self._responses.put(asked.tenant, asked.response, asked.items)
        elif asked.do == "delete":
            await self._responses.delete(asked.tenant, asked.response_id)
        else:
            one = await self._responses.get(asked.tenant, asked.response_id)
            found = _Found(one.response, one.items, is_stored=True)
        return msgspec.json.encode(found)


class Desk:
    """A front's way to the desk. The event loop's thread alone uses it.

    Args:
        address: of the desk.
        secret: the fleet's.
        rank: of this front, from 0.
        num_fronts: as the desk and all fronts are told.
        tls: to check the desk's certificate by; None is no TLS.
    """

    def __init__(
        self,
        address: Address,
        secret: bytes,
        *,
        rank: int,
        num_fronts: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._address = address
        self._rank, self._num_fronts = rank, num_fronts
        self._headers = {"authorization": f"Bearer {desk_token(secret)}", "host": "localhost"}
        where = "localhost" if address.host is None else str(address)
        self._http = httpx.AsyncClient(
            base_url=f"{'http' if tls is None else 'https'}://{where}",
            transport=httpx.AsyncHTTPTransport(uds=address.path or None, verify=tls or False),
            timeout=httpx.Timeout(_READ_S, connect=_ANSWER_S),
            trust_env=False,
        )
        self._leases = FrontLeases({}, rank=rank, num_fronts=num_fronts)
        self._asking = asyncio.Lock()
        self._denied_s: dict[KeyShare, float] = {}  # when each got nothing
        self._has_warned = False

    @contextlib.asynccontextmanager
    async def running(self, tenants: Sequence[Tenant]) -> AsyncIterator[None]:
        """Lease the limits of the tenants: each has its part alone until the desk answers."""
        shares = {}
        for one in tenants:
            one.share = KeyShare(one.limits, rank=self._rank, num_fronts=self._num_fronts)
            one.get_more = self.get_more
            shares[one.name] = one.share
        self._leases = FrontLeases(shares, rank=self._rank, num_fronts=self._num_fronts)
        asking = asyncio.create_task(self._ask_on())
        try:
            yield
        finally:
            asking.cancel()
            await self._http.aclose()

    async def get_more(self, share: KeyShare) -> None:
        """Before a request would be refused: ask for more, unless there was nothing just now.

        Where it returns and the request may begin, it must do so before anything else is awaited.
        """
        if not self._leases.is_leased:
            return
        self._leases.wish(share)
        async with self._asking:  # who asked before may have brought enough
            now_s = REAL_CLOCK.now()
            denied_s = self._denied_s.get(share)
            if share.refusal() is None or (denied_s is not None and now_s < denied_s + _AGAIN_S):
                return
            await self._ask()
            if share.refusal() is not None:
                self._denied_s[share] = now_s

    async def pass_on(self, request: Request) -> Response:
        """Have the desk answer a request. Raises EngineError: it does not."""
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        headers |= {"x-request-id": logs.request_id.get(), "host": "localhost"}
        has_body = not {"content-length", "transfer-encoding"}.isdisjoint(request.headers)
        url = httpx.URL(path=request.url.path, query=request.url.query.encode())
        asked = self._http.build_request(
            request.method, url, headers=headers, content=request.stream() if has_body else None
        )
        try:
            answer = await self._http.send(asked, stream=True)
        except httpx.TransportError as error:
            raise EngineError(_NO_ANSWER) from error
        kept = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
        return StreamingResponse(_parts_of(answer), answer.status_code, kept)

    async def put(self, tenant: str, response: Json, items: list[Json]) -> bool:
        """See `KeptResponses`."""
        asked = _Asked("put", tenant, response["id"], response, items)
        try:
            return (await self._find(asked)).is_stored
        except (ApiError, EngineError) as error:
            _log.warning("a response is not stored: %s", error)
            return False

    async def get(self, tenant: str, response_id: str) -> StoredResponse:
        """See `KeptResponses`."""
        found = await self._find(_Asked("get", tenant, response_id))
        return StoredResponse(found.response, found.items)

    async def delete(self, tenant: str, response_id: str) -> None:
        """See `KeptResponses`."""
        await self._find(_Asked("delete", tenant, response_id))

    async def _find(self, asked: _Asked) -> _Found:
        """Raises ApiError (404): there is none; EngineError: the desk does not answer."""
        content = msgspec.json.encode(asked)
        try:
            answer = await self._http.post(
                _RESPONSES, content=content, headers=self._headers, timeout=_STORE_S
            )
            if answer.status_code == 404:
                raise not_found(answer.text)
            if answer.status_code != 200:
                raise EngineError(f"the desk of this fleet has refused: {answer.text[:500]}")
            return msgspec.json.decode(answer.content, type=_Found)
        except (httpx.HTTPError, msgspec.MsgspecError) as error:
            raise EngineError(_NO_ANSWER) from error

    async def _ask_on(self) -> None:
        while True:
            was_leased = self._leases.is_leased
            async with self._asking:
                await self._ask()
            if self._leases.is_leased and not was_leased:
                continue  # what it said first was that it is there
            await asyncio.sleep(ASK_EVERY_S)

    async def _ask(self) -> None:
        """Ask once; `_asking` is held."""
        ask = msgspec.json.encode(self._leases.ask())
        try:
            answer = await self._http.post(
                _LEASES, content=ask, headers=self._headers, timeout=_ANSWER_S
            )
            if answer.status_code != 200:
                raise EngineError(answer.text[:500])
            self._leases.take(msgspec.json.decode(answer.content, type=Answer))
        except asyncio.CancelledError:
            self._leases.lost()
            raise
        except (httpx.HTTPError, EngineError, msgspec.MsgspecError) as error:
            self._leases.lost()
            self._warn(error)
        else:
            self._has_warned = False

    def _warn(self, error: Exception) -> None:
        """Say once that the desk is gone."""
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "the desk at %s gives no leases (%s); each key has 1/%d of its limits here",
                self._address,
                str(error) or type(error).__name__,
                self._num_fronts,
            )


async def _parts_of(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()
