"""The desk of a fleet: one process has the files, the batches and the limits of keys.

`DeskEntry` is the desk's side, `Desk` a front's: it passes requests for files and batches on as
they came, with the client's key, and asks for leases of limits.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import ssl
from collections.abc import AsyncIterator, Sequence

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
from hotset.server.keys import Tenant
from hotset.server.reading import read_bytes

_log = logging.getLogger(__name__)

_LEASES = "/leases"
_ANSWER_S = 1.0  # a desk that answers later counts as gone
_AGAIN_S = 0.1  # how soon a key that got nothing may ask again
_READ_S = 600.0  # of a large file, between two parts
_MOST_ASK_BYTES = 4 << 20
_PASSED_ON = ("authorization", "x-api-key", "content-type", "content-length", "accept")
_PASSED_BACK = ("content-type", "content-length", "content-disposition", "retry-after", "etag")


def desk_token(secret: bytes) -> str:
    """What a front shows to have leases: that it holds the fleet's secret."""
    return hmac.new(secret, b"hotset desk", hashlib.sha256).hexdigest()


class DeskEntry:
    """The desk's ASGI application: leases for fronts, and all that `api` answers.

    Args:
        api: has files and batches.
        ledger: has the limits of all keys.
        secret: the fleet's.
    """

    def __init__(self, api: ASGIApp, ledger: Ledger, secret: bytes) -> None:
        self._api = api
        self._ledger = ledger
        self._authorization = f"Bearer {desk_token(secret)}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["path"] == _LEASES:
            await (await self._lease(Request(scope, receive)))(scope, receive, send)
        else:
            await self._api(scope, receive, send)

    async def _lease(self, request: Request) -> Response:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), self._authorization.encode()):
            return Response("the fleet secret is another one", 401)
        try:
            body = await read_bytes(request, _MOST_ASK_BYTES)
            answer = self._ledger.answer(msgspec.json.decode(body, type=Ask))
        except (RequestError, msgspec.MsgspecError) as error:
            return Response(str(error), 400)
        return Response(msgspec.json.encode(answer), media_type="application/json")


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
        self._token = desk_token(secret)
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
            raise EngineError(
                "the desk of this fleet, which has files and batches, does not answer; try again "
                "soon"
            ) from error
        kept = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
        return StreamingResponse(_parts_of(answer), answer.status_code, kept)

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
        headers = {"authorization": f"Bearer {self._token}", "host": "localhost"}
        ask = msgspec.json.encode(self._leases.ask())
        try:
            answer = await self._http.post(_LEASES, content=ask, headers=headers, timeout=_ANSWER_S)
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
