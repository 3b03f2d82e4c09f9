"""What serves requests, each by a stream of outputs: one engine, or replicas. Imports no torch."""

import asyncio
import atexit
import contextlib
import itertools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from hotset.clock import REAL_CLOCK
from hotset.engine.latency import Latencies, RequestClock
from hotset.engine.messages import Submit
from hotset.engine.output_stream import OutputStream
from hotset.engine.status import EngineStatus
from hotset.errors import EngineError, RequestError
from hotset.metrics import Metrics
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import FinishReason, RequestOutput, SamplingParams


class StreamService(ABC):
    """Hands each request's outputs to a reader; every method may be called from any thread.

    It belongs to the process that made it. In a fork of that process, which has none of its
    threads, everything that needs an engine raises EngineError and `close` does nothing.

    Attributes:
        latencies: of all requests; they change while one reads.
    """

    def __init__(self) -> None:
        """Who derives from it calls `_close_at_exit` once all is there."""
        self.latencies = Latencies()
        self._lock = threading.Lock()
        self._streams: dict[str, OutputStream] = {}  # open ones; guarded by _lock
        self._is_closing = False  # guarded by _lock
        self._failure: str | None = None  # guarded by _lock; says why no more is served
        self._ids = itertools.count()
        self._pid = os.getpid()

    @property
    @abstractmethod
    def model(self) -> LoadedModel:
        """The model that is served; the weights may be in another process."""

    @property
    @abstractmethod
    def report(self) -> str:
        """What went where in memory."""

    @property
    @abstractmethod
    def metrics(self) -> Metrics:
        """Counters; they change while one reads."""

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """The longest context in tokens."""

    @property
    @abstractmethod
    def keeps_states(self) -> bool:
        """Whether prefixes are found up to states that were kept, so that prompts name places."""

    @property
    @abstractmethod
    def options(self) -> Options:
        """What the engine was built with."""

    @abstractmethod
    def status(self) -> "Future[EngineStatus]":
        """Look between two steps.

        Raises:
            EngineError: nothing is served; the future may raise it too.
        """

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """Stop a request, if it runs; see `OutputStream.abort`."""

    @abstractmethod
    def look_for_engine(self) -> None:
        """End the open requests that nothing works at, without a last word.

        Raises:
            EngineError: this is a fork of the process that serves.
        """

    @abstractmethod
    def _send(self, submit: Submit) -> None:
        """Queue a request whose stream is open. Raises as `submit` does: nothing was queued."""

    @abstractmethod
    def _stop(self) -> None:
        """End what serves, and wait for that. No more outputs come."""

    @property
    def healthy(self) -> bool:
        """Whether requests are served."""
        try:
            self.raise_unless_healthy()
        except EngineError:
            return False
        return True

    @property
    def is_forked(self) -> bool:
        """Whether this is a fork of the process that the engine belongs to."""
        return os.getpid() != self._pid

    @property
    def num_open(self) -> int:
        """Requests that have not ended, queued ones included."""
        return len(self._streams)

    def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        salt: bytes = b"",
        priority: int = 0,
        request_id: str | None = None,
        tenant: str = "",
        timeout_s: float | None = None,
        queue_limit: int | None = None,
        snapshot_at: Sequence[int] = (),
    ) -> OutputStream:
        """Queue a prompt and return the stream of its outputs. Does not wait for a step.

        Args:
            token_ids: of the prompt.
            params: how its outputs are chosen.
            salt: requests with another one cannot find each other's blocks.
            priority: lower runs first.
            request_id: unique, without `#`; None makes one.
            tenant: whom it is from; tenants are served in fair order.
            timeout_s: when this has passed the outputs end as aborted, `error` saying so.
            queue_limit: most requests, of all tenants, that may wait.
            snapshot_at: numbers of leading tokens that other prompts are likely to repeat.

        Raises:
            RequestError: the request can never be served; nothing was queued.
            OverloadedError: too many wait already; nothing was queued.
            EngineError: nothing is served: it has failed, was closed, or is another process's.
        """
        self.raise_unless_healthy()  # before any lock, which in a fork may be held for ever
        if request_id is None:
            request_id = f"hotset-{next(self._ids)}"
        elif "#" in request_id:
            raise RequestError(f"request id {request_id!r} has a '#' in it")
        who = (salt, priority, tenant)
        submit = Submit(request_id, token_ids, params, *who, timeout_s, queue_limit, snapshot_at)
        stream = OutputStream(
            self, request_id, params.n, RequestClock(self.latencies, REAL_CLOCK.now())
        )
        with self._lock:
            self.raise_unless_healthy()
            if request_id in self._streams:
                raise RequestError(f"request id {request_id!r} is in use")
            self._streams[request_id] = stream
        try:
            self._send(submit)
        except BaseException:
            with self._lock:
                self._streams.pop(request_id, None)
            raise
        return stream

    def raise_unless_healthy(self) -> None:
        """Raise EngineError, with the reason, where no requests are served."""
        if self.is_forked:
            raise EngineError(
                f"the engine is in process {self._pid}, and process {os.getpid()} is a fork of it, "
                "which has no engine: make one in each worker, and start workers with 'spawn'"
            )
        if self._failure is not None:
            raise EngineError(self._failure)
        if self._is_closing:
            raise EngineError("the engine was closed")

    def close(self) -> None:
        """End open requests as aborted, and what serves them, and wait for its end. Idempotent.

        In a fork it does nothing: the engine is another process's.
        """
        if self.is_forked:
            return
        with self._lock:
            self._is_closing = True
        self._stop()
        self._end_all(FinishReason.ABORT, None)
        atexit.unregister(self.close)

    def _close_at_exit(self) -> None:
        """A daemon thread in the middle of a step would be cut off while Python shuts down."""
        atexit.register(self.close)

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        with self._lock:
            streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.end(reason, error)

    def _note_started(self, request_ids: Iterable[str], time_s: float) -> None:
        """Requests are part of a step for the first time."""
        for request_id in request_ids:
            if (stream := self._streams.get(request_id)) is not None:
                stream.clock.start(time_s)

    def _deliver(self, outputs: Iterable[RequestOutput], time_s: float) -> None:
        """Hand outputs to the streams of their requests; those of unknown requests are dropped.

        A request's outputs come from one thread after another, never from two at once.
        """
        # One call into an event loop for all its readers: each wakes the loop's thread.
        to_wake: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            stream.clock.output(output.index, len(output.token_ids), time_s)
            reader = stream.put(output)
            if reader is not None:
                to_wake.setdefault(reader[0], []).append(reader[1])
            if stream.is_over:
                if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                    stream.clock.start(time_s)
                    stream.clock.end(output.prompt_tokens, time_s)
                with self._lock:
                    self._streams.pop(output.request_id, None)
        for loop, events in to_wake.items():
            with contextlib.suppress(RuntimeError):  # the readers' loop is closed
                loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
