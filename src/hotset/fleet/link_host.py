"""A replica as its front sees it: an engine at the other end of a link. Imports no torch."""

import asyncio
import contextlib
import itertools
import logging
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future

from hotset.clock import REAL_CLOCK
from hotset.engine.messages import Report, Submit
from hotset.errors import EngineError, ModelError, RequestError
from hotset.fleet import wire
from hotset.fleet.address import Address
from hotset.fleet.link import HANDSHAKE_S, Link, SilentError, link_thread
from hotset.fleet.proof import LinkError, prove_front
from hotset.fleet.tokenizer_data import known_tokenizers, loaded_model
from hotset.metrics import Metrics

_log = logging.getLogger(__name__)


class LinkHost:
    """One connection to a replica; see `EngineHost`.

    When the connection ends, the replica aborts its requests, and the last report says why it
    ended. A replica that can be reached again needs a new `LinkHost`.

    Args:
        address: of the replica, see `Address.of`.
        secret: of the fleet.
        on_report: called from one thread that all links of this process share, which nothing may
            hold up: `submit`, `close` and further links raise RuntimeError there. A report's
            `time_s` is by this machine's clock, when it arrived.
        tls: how to check the replica's certificate; None is no TLS.

    Raises:
        EngineError: the replica cannot be reached, has another secret or another version, or says
            nothing for 5 s. ConfigError: the address is none.

    Attributes:
        replica_id: as the replica calls itself.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        on_report: Callable[[Report], None],
        *,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._address, self._on_report = Address.of(address), on_report
        self._name = f"the replica at {self._address}"
        self._lock = threading.Lock()
        self._pending: dict[int, Future[None]] = {}  # submits without an answer; by _lock
        self._ended: str | None = None  # why no submit is taken; by _lock
        self._is_closed = False  # by _lock
        self._numbers = itertools.count()
        self._metrics = Metrics()
        self._has_failed = False  # the engine, as its last report says
        self._is_over = threading.Event()
        self._thread = link_thread()
        self._link, welcome = self._thread.wait(self._open(secret, tls))
        try:
            self.replica_id = welcome.replica_id
            self._name = f"replica {self.replica_id}"
            self.info = wire.read_info(welcome.info)
            self.model = loaded_model(welcome.model)
        except (wire.WireError, ModelError) as error:
            self._thread.call(self._link.abort)
            raise EngineError(f"{self._name} cannot be used: {error}") from None
        self._thread.call(self._start)

    @property
    def is_alive(self) -> bool:
        """See `EngineHost`."""
        return not self._is_over.is_set()

    @property
    def metrics(self) -> Metrics:
        """The engine's counters as of a moment ago."""
        return self._metrics

    def submit(self, submit: Submit) -> None:
        """See `EngineHost`; waits for the replica's answer, not for a step.

        Raises:
            RequestError: the request can never be served. OverloadedError: too many wait already.
            EngineError: the link has ended, so that nobody knows whether it was queued; or the
                replica takes no more.
        """
        if self._thread.is_current:
            raise RuntimeError("the thread of links cannot wait for an answer")
        number = next(self._numbers)
        frame = wire.encode(wire.submitted(number, submit))
        if len(frame) > wire.MOST_BYTES:
            raise RequestError(
                f"the request has {len(frame)} bytes on a link; expected at most {wire.MOST_BYTES}"
            )
        answer: Future[None] = Future()
        with self._lock:
            if self._ended is not None:
                raise EngineError(self._ended)
            self._pending[number] = answer
        self._thread.call(self._link.send, frame)
        answer.result()

    def abort(self, request_id: str) -> None:
        """See `EngineHost`."""
        self._thread.call(self._link.send, wire.encode(wire.Abort(request_id)))

    def look(self, look_id: int) -> None:
        """See `EngineHost`."""
        self._thread.call(self._link.send, wire.encode(wire.Look(look_id)))

    def follow(self, is_on: bool) -> None:
        """See `EngineHost`."""
        self._thread.call(self._link.send, wire.encode(wire.Follow(is_on)))

    def drain(self, drain_s: float) -> None:
        """See `EngineHost`; for all fronts of the replica."""
        self._thread.call(self._link.send, wire.encode(wire.Drain(drain_s)))

    def close(self) -> None:
        """End the connection and wait for that; the replica goes on. Idempotent."""
        with self._lock:
            self._is_closed = True
        self._thread.call(self._link.close)
        if self._thread.is_current:
            raise RuntimeError("the thread of links cannot wait for a link's end")
        self._is_over.wait()

    # What follows runs in the thread of links.

    async def _open(self, secret: bytes, tls: ssl.SSLContext | None) -> tuple[Link, wire.Welcome]:
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                reader, writer = await self._address.connect(tls)
                link = Link(reader, writer, await prove_front(reader, writer, secret))
                link.send(wire.encode(wire.Hello(list(wire.VERSIONS), known_tokenizers())))
                greeting = wire.read_greeting(await link.receive(wire.MOST_BYTES))
                if isinstance(greeting, wire.Refused):
                    raise LinkError(greeting.reason)
        except (OSError, LinkError, wire.WireError, UnicodeError) as error:
            if writer is not None:
                writer.transport.abort()
            reason = getattr(error, "strerror", None) or str(error)
            if isinstance(error, TimeoutError):
                reason = f"it did not answer within {HANDSHAKE_S:g} s"
            raise EngineError(f"no link to {self._name}: {reason}") from None
        return link, greeting

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        is_silent = False
        try:
            await self._link.run(self._take)
        except (LinkError, wire.WireError) as error:
            failure = f"the link to {self._name} has ended: {error}"
            is_silent = isinstance(error, SilentError)
        except Exception as error:
            _log.exception("a message of a replica cannot be taken")
            failure = f"messages of {self._name} cannot be taken: {error}"
        self._link.abort()
        with self._lock:
            is_closed = self._is_closed
            self._ended = "the link was closed" if is_closed else failure
            pending, self._pending = list(self._pending.values()), {}
        for answer in pending:
            answer.set_exception(EngineError(self._ended))
        if not is_closed and not self._has_failed:
            with contextlib.suppress(Exception):
                now_s = REAL_CLOCK.now()
                self._on_report(Report(now_s, failure=failure, is_silent=is_silent))
        self._is_over.set()

    def _take(self, frame: bytes) -> None:
        batch = wire.read_batch(frame)
        if batch.metrics is not None:
            self._metrics = batch.metrics
        for answer in batch.answers:
            with self._lock:
                waiting = self._pending.pop(answer.number, None)
            if waiting is None:
                continue
            if answer.refusal is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(wire.error_of(answer.refusal))
        now_s = REAL_CLOCK.now()
        for report in batch.reports:
            report.time_s = now_s
            self._has_failed = self._has_failed or report.failure is not None
            self._on_report(report)
