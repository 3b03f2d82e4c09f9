"""The replica's end of links: one engine for any number of fronts. Imports no torch."""

import asyncio
import contextlib
import itertools
import logging
import os
import ssl
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import cast

import msgspec

from hotset.clock import REAL_CLOCK
from hotset.engine.messages import EngineHost, Load, Report, Submit
from hotset.engine.status import EngineStatus
from hotset.errors import RequestError
from hotset.fleet import wire
from hotset.fleet.address import Address, bound
from hotset.fleet.link import HANDSHAKE_S, Link, link_thread, together
from hotset.fleet.proof import LinkError, prove_replica
from hotset.fleet.tokenizer_data import model_data
from hotset.metrics import Metrics
from hotset.request import RequestOutput

_log = logging.getLogger(__name__)

_MOST_UNPROVEN = 64  # connections that have not proved that they have the secret
_METRICS_EVERY_S = 0.25
_TICKS_PER_METRICS = 4  # of an engine that does nothing
_MOST_REPORTS = 256  # in a batch; what part of a journal a report may have keeps it within a frame
_MOST_HELD = 2**16  # reports, for a front that takes less than comes
_CLOSE_S = 1.0


class Listener:
    """Takes links of fronts to one engine.

    When a link ends, its requests are aborted. Fronts choose request ids on their own: those that
    the engine gets have the number of their link before them.

    Args:
        address: where to listen; bound at once.
        secret: of the fleet.
        replica_id: what fronts call this replica.
        tls: with this replica's certificate; None is no TLS. A Unix socket has none.

    Raises:
        ConfigError: the address cannot be used.

    Attributes:
        address: where it listens, its port known.
        load: of the engine, as of a moment ago; None before the first.
    """

    def __init__(
        self,
        address: Address,
        secret: bytes,
        *,
        replica_id: str,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._socket = address.listen()
        self.address = bound(self._socket)
        self._secret, self.replica_id, self._tls = secret, replica_id, tls
        self._thread = link_thread()
        # Compiling a JSON schema may take long, and an abort should not wait for it.
        self._submits = ThreadPoolExecutor(4, "hotset-submit")
        self._others = ThreadPoolExecutor(1, "hotset-abort")
        self._is_closed = False
        self.load: Load | None = None
        # What follows is used in the thread of links alone.
        self._num_unproven = 0
        self._is_draining = False
        self._numbers = itertools.count(1)
        self._fronts: set[_Front] = set()
        self._followers: set[_Front] = set()
        self._routes: dict[str, _Route] = {}  # by the engine's request id
        self._looks: dict[int, tuple[_Front, int]] = {}
        self._look_ids = itertools.count()

    def take_report(self, report: Report) -> None:
        """What the engine's host calls with each of its reports."""
        self._thread.call(self._share, report)

    def serve(self, host: EngineHost) -> None:
        """Take fronts from now on.

        Args:
            host: whose reports come to `take_report`. Not closed by this.

        Raises:
            ModelError: fronts cannot have the model's tokenizer.
        """
        self._host = host
        self._model, self._info = model_data(host.model), wire.info_data(host.info)
        self._thread.wait(self._listen())
        host.follow(True)  # for `load`

    @property
    def num_open(self) -> int:
        """Requests of fronts that have not ended."""
        return len(self._routes)

    def drain(self, drain_s: float) -> None:
        """Have the engine drain, see `EngineHost.drain`; a report tells all fronts."""
        self._host.drain(drain_s)

    def close(self) -> None:
        """Take no more fronts, end all links and wait for that. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._thread.wait(self._end())
        self._submits.shutdown()
        self._others.shutdown()
        self._socket.close()
        if self.address.host is None:
            with contextlib.suppress(OSError):
                os.unlink(self.address.path)

    # What follows runs in the thread of links.

    async def _listen(self) -> None:
        if self.address.host is None:
            self._server = await asyncio.start_unix_server(self._greet, sock=self._socket)
        else:
            self._server = await asyncio.start_server(
                self._greet,
                sock=self._socket,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else HANDSHAKE_S,
            )
        self._ticking = asyncio.ensure_future(self._tick())

    async def _end(self) -> None:
        if hasattr(self, "_server"):
            self._server.close()
            self._ticking.cancel()
        for front in self._fronts:
            front.send_rest()
        for end in (Link.close, Link.abort):  # of who takes nothing, too
            for front in self._fronts:
                end(front.link)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    while self._fronts:
                        await asyncio.sleep(0.01)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What each connection runs, to its end."""
        peer = writer.get_extra_info("peername") or "a local process"
        self._num_unproven += 1
        try:
            if self._num_unproven > _MOST_UNPROVEN:
                raise LinkError(f"{_MOST_UNPROVEN} connections have proved nothing yet")
            async with asyncio.timeout(HANDSHAKE_S):
                link = Link(reader, writer, await prove_replica(reader, writer, self._secret))
                await self._welcome(link)
        except (TimeoutError, LinkError, wire.WireError) as error:
            reason = str(error) or f"it took more than {HANDSHAKE_S:g} s"
            _log.warning("no link to %s: %s", peer, reason)
            writer.transport.abort()
            return
        finally:
            self._num_unproven -= 1
        front = _Front(next(self._numbers), link)
        self._fronts.add(front)
        if self._is_draining:
            front.report(Report(REAL_CLOCK.now(), is_draining=True))
        try:
            await together(link.run(lambda frame: self._take(front, frame)), front.send_all())
        except (LinkError, wire.WireError) as error:
            _log.info("the link to front %d (%s) has ended: %s", front.number, peer, error)
        except Exception:
            _log.exception("the link to front %d has failed", front.number)
        finally:
            self._drop(front)

    async def _welcome(self, link: Link) -> None:
        """Read a front's greeting and answer it. Raises LinkError or WireError."""
        hello = wire.read_hello(await link.receive(wire.MOST_HELLO_BYTES))
        version = wire.agree(wire.VERSIONS, hello.versions)
        if version is None:
            reason = (
                f"the front speaks versions {hello.versions} of the link, and this replica "
                f"{list(wire.VERSIONS)}; run releases of hotset that follow each other"
            )
            link.send(wire.encode(wire.Refused(reason)))
            await link.drained()
            raise LinkError(reason)
        model = self._model
        if model.tokenizer_digest in hello.tokenizers:
            model = msgspec.structs.replace(model, tokenizer=None)
        link.send(wire.encode(wire.Welcome(version, self.replica_id, model, self._info)))

    def _drop(self, front: "_Front") -> None:
        self._fronts.discard(front)
        self._followers.discard(front)
        front.link.abort()
        for engine_id in [one for one, route in self._routes.items() if route.front is front]:
            del self._routes[engine_id]
            self._others.submit(self._host.abort, engine_id)

    def _take(self, front: "_Front", frame: bytes) -> None:
        """Do what a front asks for. Raises WireError."""
        message = wire.read_front_message(frame)
        if isinstance(message, wire.Submitted):
            self._take_submit(front, message)
        elif isinstance(message, wire.Abort):
            engine_id = front.engine_id(message.request_id)
            if (route := self._routes.get(engine_id)) is not None:
                route.is_aborted = True
                self._others.submit(self._host.abort, engine_id)
        elif isinstance(message, wire.Drain):
            self._others.submit(self._host.drain, message.drain_s)
        elif isinstance(message, wire.Follow):
            self._follow(front, message.is_on)
        else:
            look_id = next(self._look_ids)
            self._looks[look_id] = front, message.look_id
            self._others.submit(self._host.look, look_id)

    def _follow(self, front: "_Front", is_on: bool) -> None:
        """A snapshot that one front asks for goes to all that follow."""
        (self._followers.add if is_on else self._followers.discard)(front)
        if is_on:
            self._others.submit(self._host.follow, True)

    def _take_submit(self, front: "_Front", message: wire.Submitted) -> None:
        try:
            submit = wire.read_submit(message)
            engine_id = front.engine_id(submit.request_id)
            if engine_id in self._routes:
                raise RequestError(f"request id {submit.request_id!r} is in use")
        except RequestError as error:
            front.answer(wire.Answer(message.number, wire.refusal_of(error)))
            return
        route = _Route(front, submit.request_id, len(submit.resumed) or submit.params.n)
        self._routes[engine_id] = route
        self._submits.submit(
            self._submit, route, message.number, replace(submit, request_id=engine_id)
        )

    def _submit(self, route: "_Route", number: int, submit: Submit) -> None:
        """In a thread of its own."""
        refusal = None
        try:
            self._host.submit(submit)
        except Exception as error:
            refusal = wire.refusal_of(error)
        self._thread.call(self._answer, route, submit.request_id, wire.Answer(number, refusal))

    def _answer(self, route: "_Route", engine_id: str, answer: wire.Answer) -> None:
        if answer.refusal is not None:
            self._routes.pop(engine_id, None)
        elif route.is_aborted or route.front not in self._fronts:  # which came too early
            self._others.submit(self._host.abort, engine_id)
        route.front.answer(answer)

    def _share(self, report: Report) -> None:
        """Give each front what is its own of a report."""
        self.load = report.load or self.load
        self._is_draining = self._is_draining or report.is_draining
        for note in report.notes:
            _log.info("%s", note)
        shares: dict[_Front, _Share] = {}
        common = replace(report, outputs=(), started=(), taken=(), looks=(), notes=())
        if common != Report(report.time_s):
            is_for_all = common.failure is not None or common.is_draining
            told = self._fronts if is_for_all else self._followers
            shares = {front: _Share() for front in told}
        for output in report.outputs:
            if (route := self._routes.get(output.request_id)) is None:
                continue
            shares.setdefault(route.front, _Share()).outputs.append(route.output(output))
            if output.finish_reason is not None:
                route.num_unfinished -= 1
                if not route.num_unfinished:
                    del self._routes[output.request_id]
        for name in ("started", "taken"):
            for engine_id in getattr(report, name):
                if (route := self._routes.get(engine_id)) is not None:
                    share = shares.setdefault(route.front, _Share())
                    getattr(share, name).append(route.request_id)
        for number, seen in report.looks:
            front, look_id = self._looks.pop(number)
            shares.setdefault(front, _Share()).looks.append((look_id, seen))
        for front, share in shares.items():
            front.report(
                replace(
                    common,
                    outputs=share.outputs,
                    started=share.started,
                    taken=share.taken,
                    looks=share.looks,
                )
            )

    async def _tick(self) -> None:
        """Send counters: soon after outputs, and each second at least."""
        for number in itertools.count():
            await asyncio.sleep(_METRICS_EVERY_S)
            for front in self._fronts:
                if front.is_stale or number % _TICKS_PER_METRICS == 0:
                    front.send_metrics(self._host.metrics)


@dataclass(slots=True)
class _Share:
    """The part of a report that is for one front."""

    outputs: list[RequestOutput] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    looks: list[tuple[int, EngineStatus | str]] = field(default_factory=list)


class _Front:
    """A front with a link.

    Attributes:
        number: no other front has had it.
        is_stale: whether it got reports after the last counters.
    """

    def __init__(self, number: int, link: Link) -> None:
        self.number, self.link = number, link
        self.is_stale = True
        self._reports: list[Report] = []
        self._answers: list[wire.Answer] = []
        self._metrics: Metrics | None = None
        self._news = asyncio.Event()

    def engine_id(self, request_id: str) -> str:
        """What the engine calls a request of this front."""
        return f"{self.number}:{request_id}"

    def answer(self, answer: wire.Answer) -> None:
        """Send it soon."""
        self._answers.append(answer)
        self._news.set()

    def report(self, report: Report) -> None:
        """Send it soon, with the others that are there by then."""
        if len(self._reports) >= _MOST_HELD:
            self.link.abort()
            return
        self._reports.append(report)
        self.is_stale = True
        self._news.set()

    def send_metrics(self, metrics: Metrics) -> None:
        """Send counters soon."""
        self._metrics = metrics
        self.is_stale = False
        self._news.set()

    async def send_all(self) -> None:
        """Send what is there, all at once; what comes while the link is full waits for the next.

        Raises:
            LinkError: the link has ended.
        """
        while True:
            await self._news.wait()
            self._send()
            await self.link.drained()

    def send_rest(self) -> None:
        """Send all that is there now, before the link is closed."""
        while self._news.is_set():
            self._send()

    def _send(self) -> None:
        """Send a batch; the rest is left if there is more than a batch takes."""
        batch = wire.Batch(self._reports[:_MOST_REPORTS], self._answers, self._metrics)
        self._reports, self._answers = self._reports[_MOST_REPORTS:], []
        self._metrics = None
        if not self._reports:
            self._news.clear()
        self.link.send(wire.encode(batch))


@dataclass(eq=False, slots=True)
class _Route:
    """Whose request it is that an engine has.

    Attributes:
        num_unfinished: outputs without a last one.
        is_aborted: by the front.
    """

    front: _Front
    request_id: str
    num_unfinished: int
    is_aborted: bool = False

    def output(self, output: RequestOutput) -> RequestOutput:
        """An output with the front's own id of the request, and an error that can be encoded."""
        if output.error is not None:
            output = output._replace(error=wire.printable(output.error))
        # A plain tuple is encoded alike, and made in a tenth of the time.
        return cast(RequestOutput, (self.request_id, *output[1:]))
