"""The engine for any number of threads and event loops: each request gets a stream of outputs.

Imports no torch.
"""

import asyncio
import atexit
import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial

from hotset.clock import REAL_CLOCK
from hotset.engine.latency import Latencies, RequestClock
from hotset.engine.messages import BuildEngine, EngineHost, Report, Submit
from hotset.engine.output_stream import OutputStream
from hotset.engine.process import EngineProcess
from hotset.engine.restarts import Restarts
from hotset.engine.status import EngineStatus
from hotset.errors import EngineError, HotsetError, RequestError
from hotset.metrics import Metrics
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import FinishReason, RequestOutput, SamplingParams

_log = logging.getLogger(__name__)


class EngineService:
    """Runs an engine beside its callers; every method may be called from any thread.

    An engine belongs to the process that made it. In a fork of that process, which has none of
    its threads, everything that needs the engine raises EngineError and `close` does nothing.

    Args:
        options: what to load and how.
        build: makes the engine; raises a HotsetError where it cannot. None is `load_engine`.
        own_process: run it in a process of its own, so that nothing that Python does here can
            delay a step; otherwise in a thread. `build` must then be importable by name. An engine
            of several ranks has a process in any case, and starts again when a rank has failed.

    Raises:
        HotsetError: the engine cannot be built; nothing is left running.

    Attributes:
        latencies: of all requests; they change while one reads.
    """

    def __init__(
        self,
        options: Options,
        *,
        build: BuildEngine | None = None,
        own_process: bool = False,
    ) -> None:
        self.latencies = Latencies()
        self._lock = threading.Lock()
        self._streams: dict[str, OutputStream] = {}  # open ones; guarded by _lock
        self._looks: dict[int, Future[EngineStatus]] = {}  # guarded by _lock
        self._is_closing = False  # guarded by _lock
        self._failure: str | None = None  # guarded by _lock; says why no more is served
        self._ids = itertools.count()
        self._pid = os.getpid()
        self._host: EngineHost
        has_ranks = options.layout.tp > 1
        self._restarts = Restarts() if has_ranks else None
        self._is_restarting = False  # guarded by _lock
        self._close_event = threading.Event()
        # Nothing here imports torch then, so that the child starts at once.
        if own_process or has_ranks:
            self._start = partial(EngineProcess, options, build, self._take_report)
            self._host = self._start()
        else:
            from hotset.engine.load import load_engine
            from hotset.engine.loop import EngineLoop

            self._host = EngineLoop(options, build or load_engine, self._take_report)
        self.model: LoadedModel = self._host.model
        # A daemon thread in the middle of a step would be cut off while Python shuts down.
        atexit.register(self.close)

    @property
    def healthy(self) -> bool:
        """Whether requests are served."""
        return self._failure is None and not self._is_closing and not self.is_forked

    @property
    def is_forked(self) -> bool:
        """Whether this is a fork of the process that the engine belongs to."""
        return os.getpid() != self._pid

    @property
    def report(self) -> str:
        """What went where in memory."""
        return self._host.info.report

    @property
    def metrics(self) -> Metrics:
        """The engine's counters; they change while one reads."""
        return self._host.metrics

    @property
    def max_model_len(self) -> int:
        """The longest context in tokens."""
        return self._host.info.max_model_len

    @property
    def keeps_states(self) -> bool:
        """Whether prefixes are found up to states that were kept, so that prompts name places."""
        return self._host.info.keeps_states

    @property
    def options(self) -> Options:
        """What the engine was built with."""
        return self._host.info.options

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
            EngineError: the engine has failed, was closed, or is another process's.
        """
        self.raise_unless_healthy()  # before any lock, which in a fork may be held for ever
        if request_id is None:
            request_id = f"hotset-{next(self._ids)}"
        elif "#" in request_id:
            raise RequestError(f"request id {request_id!r} has a '#' in it")
        clock = RequestClock(self.latencies, REAL_CLOCK.now())
        stream = OutputStream(self, request_id, params.n, clock)
        with self._lock:
            self.raise_unless_healthy()
            if request_id in self._streams:
                raise RequestError(f"request id {request_id!r} is in use")
            self._streams[request_id] = stream
        try:
            self._host.submit(
                Submit(
                    request_id,
                    token_ids,
                    params,
                    salt=salt,
                    priority=priority,
                    tenant=tenant,
                    timeout_s=timeout_s,
                    queue_limit=queue_limit,
                    snapshot_at=snapshot_at,
                )
            )
        except BaseException:
            with self._lock:
                self._streams.pop(request_id, None)
            raise
        return stream

    def status(self) -> "Future[EngineStatus]":
        """Look at the engine between two steps.

        Raises:
            EngineError: the engine has failed or was closed; the future may raise it too.
        """
        self.raise_unless_healthy()
        future: Future[EngineStatus] = Future()
        look_id = next(self._ids)
        with self._lock:
            self.raise_unless_healthy()
            self._looks[look_id] = future
        self._host.look(look_id)
        return future

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
        """End open requests as aborted, close the engine and wait for its end. Idempotent.

        In a fork it does nothing: the engine is another process's.
        """
        if self.is_forked:
            return
        with self._lock:
            self._is_closing = True
        self._close_event.set()
        self._host.close()
        self._end_all(FinishReason.ABORT, None)
        atexit.unregister(self.close)

    def abort(self, request_id: str) -> None:
        """Stop a request, if it runs; see `OutputStream.abort`."""
        self._host.abort(request_id)

    def look_for_engine(self) -> None:
        """End open requests if the engine is gone without a last word.

        Raises:
            EngineError: this is a fork of the process that has the engine.
        """
        if self.is_forked:
            self.raise_unless_healthy()
        if self._host.is_alive:
            return
        with self._lock:
            if not self._is_closing and self._failure is None:
                self._failure = "the engine has ended without a word"
            failure = self._failure
        self._end_all(FinishReason.ABORT if failure is None else FinishReason.ERROR, failure)

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        with self._lock:
            streams, self._streams = list(self._streams.values()), {}
            looks, self._looks = list(self._looks.values()), {}
        for stream in streams:
            stream.end(reason, error)
        for look in looks:
            if look.set_running_or_notify_cancel():
                look.set_exception(EngineError(error or "the engine was closed"))

    # What follows is called from one thread, by the engine's host.

    def _take_report(self, report: Report) -> None:
        for request_id in report.started:
            if (stream := self._streams.get(request_id)) is not None:
                stream.clock.start(report.time_s)
        self._deliver(report.outputs, report.time_s)
        for look_id, seen in report.looks:
            with self._lock:
                look = self._looks.pop(look_id, None)
            if look is not None and look.set_running_or_notify_cancel():
                if isinstance(seen, str):
                    look.set_exception(EngineError(seen))
                else:
                    look.set_result(seen)
        for note in report.notes:
            _log.info("%s", note)
        if report.failure is not None:
            with self._lock:
                self._failure = self._failure or report.failure  # the first says why
                starts = self._restarts is not None and not self._is_restarting
                self._is_restarting = self._is_restarting or starts
            self._end_all(FinishReason.ERROR, self._failure)
            if starts:
                threading.Thread(target=self._restart, name="hotset-restart", daemon=True).start()

    def _restart(self) -> None:
        """Start the engine again, in a thread of its own, until it serves or has failed often."""
        assert self._restarts is not None
        self._host.close()
        while (delay_s := self._restarts.next_delay_s()) is not None:
            _log.error("%s; starting again in %g s", self._failure, delay_s)
            if self._close_event.wait(delay_s):
                return
            try:
                host = self._start()
            except HotsetError as error:
                self._failure = str(error)
                continue
            with self._lock:
                self._host, self._is_restarting, self._failure = host, False, None
                is_closing = self._is_closing
            if is_closing:
                host.close()
            return
        _log.error("%s; it has failed too often to be started again", self._failure)

    def _deliver(self, outputs: Iterable[RequestOutput], time_s: float) -> None:
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
