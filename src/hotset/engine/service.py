"""The engine in a thread of its own, for any number of threads and event loops."""

import asyncio
import atexit
import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from hotset.config import EngineConfig
from hotset.engine.engine import Engine
from hotset.engine.fair_queue import FairQueue
from hotset.engine.latency import Latencies, RequestClock
from hotset.engine.status import EngineStatus, engine_status
from hotset.errors import EngineError, OverloadedError, RequestError
from hotset.metrics import Metrics
from hotset.model.loader import LoadedModel, load_model
from hotset.request import FinishReason, RequestOutput, SamplingParams

_log = logging.getLogger(__name__)

# With no request left, how often the engine takes note of copies that still run between tiers.
_TRANSFER_CHECK_S = 0.05
# At the end, how long copies between tiers may take to arrive where a restart finds them.
_SETTLE_S = 5.0
# Requests handed to the engine before it has room, so that it can stage their blocks.
_AHEAD = 8
_RATE_WINDOW_S = 30.0
_MOST_RETRY_AFTER_S = 60


def build_engine(config: EngineConfig) -> tuple[Engine, LoadedModel]:
    """Load the model and set up the engine. Raises what either raises."""
    loaded = load_model(config.model, device=config.device, dtype=config.dtype)
    return Engine(config, loaded), loaded


class EngineService:
    """Runs an engine in one background thread; every method may be called from any thread.

    The engine is built, used and closed in that thread alone. The constructor returns when it
    is ready. Requests wait here, in fair order between tenants, and the engine gets as many as
    it can soon start.

    Args:
        config: what to load and how.
        build: makes the engine; raises a HotsetError where it cannot.

    Raises:
        HotsetError: the engine cannot be built; no thread is left.

    Attributes:
        latencies: of all requests; they change while one reads.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        build: Callable[[EngineConfig], tuple[Engine, LoadedModel]] = build_engine,
    ) -> None:
        self.latencies = Latencies()
        self._wake = threading.Condition()
        self._inbox: deque[_Submit | _Abort | _Look] = deque()  # guarded by _wake
        self._num_queued = 0  # requests the engine has not got; guarded by _wake
        self._is_closing = False  # guarded by _wake
        self._failure: str | None = None  # guarded by _wake; says why no more is served
        self._ids = itertools.count()
        # What follows is used by the engine thread alone.
        self._queue: FairQueue[_Submit] = FairQueue()
        self._streams: dict[str, _Submit] = {}  # those the engine has
        self._not_started: dict[str, _Submit] = {}  # of these, those that no step had yet
        self._deadlines: list[tuple[float, int, _Submit]] = []  # a heap
        self._finished_s: deque[float] = deque(maxlen=1024)
        ready: Future[tuple[Engine, LoadedModel]] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(config, build, ready), name="hotset-engine", daemon=True
        )
        self._thread.start()
        try:
            self._engine, self.model = ready.result()
        except BaseException:  # Ctrl-C included: the thread ends once the engine is built
            self._request_close()
            raise
        # A daemon thread in the middle of a step would be cut off while Python shuts down.
        atexit.register(self.close)

    @property
    def healthy(self) -> bool:
        """Whether requests are served."""
        return self._failure is None and not self._is_closing

    @property
    def report(self) -> str:
        """What went where in memory."""
        return self._engine.report

    @property
    def metrics(self) -> Metrics:
        """The engine's counters; they change while one reads."""
        return self._engine.metrics

    @property
    def max_model_len(self) -> int:
        """The longest context in tokens."""
        return self._engine.max_model_len

    @property
    def config(self) -> EngineConfig:
        """What the engine was built with."""
        return self._engine.config

    @property
    def num_open(self) -> int:
        """Requests that have not ended, queued ones included."""
        return self._num_queued + len(self._streams)

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
    ) -> "OutputStream":
        """Queue a prompt and return the stream of its outputs. Does not wait for the engine.

        Args:
            token_ids: of the prompt.
            params: how its outputs are chosen.
            salt: requests with another one cannot find each other's blocks.
            priority: lower runs first.
            request_id: unique, without `#`; None makes one.
            tenant: whose it is; tenants are served in fair order.
            timeout_s: when this has passed the outputs end as aborted, `error` saying so.
            queue_limit: most requests, of all tenants, that may wait.

        Raises:
            RequestError: the request can never be served; nothing was queued.
            OverloadedError: too many wait already; nothing was queued.
            EngineError: the engine has failed or was closed.
        """
        self._engine.validate(token_ids, params)
        if request_id is None:
            request_id = f"hotset-{next(self._ids)}"
        elif "#" in request_id:
            raise RequestError(f"request id {request_id!r} has a '#' in it")
        stream = OutputStream(self, request_id, params.n)
        now_s = time.monotonic()
        submit = _Submit(
            stream,
            list(token_ids),
            params,
            salt,
            priority,
            tenant,
            timeout_s,
            RequestClock(self.latencies, now_s),
        )
        with self._wake:
            self.raise_unless_healthy()
            if queue_limit is not None and self._num_queued >= queue_limit:
                raise OverloadedError(
                    f"{self._num_queued} requests wait already; try again later",
                    retry_after_s=self._retry_after_s(now_s),
                )
            self._num_queued += 1
            self._inbox.append(submit)
            self._wake.notify()
        return stream

    def status(self) -> "Future[EngineStatus]":
        """Look at the engine between two steps.

        Raises:
            EngineError: the engine has failed or was closed; the future may raise it too.
        """
        look = _Look(Future())
        with self._wake:
            self.raise_unless_healthy()
            self._inbox.append(look)
            self._wake.notify()
        return look.result

    def raise_unless_healthy(self) -> None:
        """Raise EngineError, with the reason, where no requests are served any more."""
        if self._failure is not None:
            raise EngineError(self._failure)
        if self._is_closing:
            raise EngineError("the engine was closed")

    def close(self) -> None:
        """End open requests as aborted, close the engine and wait for its thread. Idempotent."""
        self._request_close()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _request_close(self) -> None:
        with self._wake:
            self._is_closing = True
            self._wake.notify()

    def _abort(self, stream: "OutputStream") -> None:
        with self._wake:
            self._inbox.append(_Abort(stream))
            self._wake.notify()

    def _retry_after_s(self, now_s: float) -> int:
        """How long the queue should take, at the pace of late."""
        recent = [s for s in list(self._finished_s) if s > now_s - _RATE_WINDOW_S]
        if not recent:
            return 1
        seconds = self._num_queued * (now_s - recent[0]) / len(recent)
        return max(1, min(_MOST_RETRY_AFTER_S, round(seconds)))

    # What follows runs in the engine thread.

    def _run(
        self,
        config: EngineConfig,
        build: Callable[[EngineConfig], tuple[Engine, LoadedModel]],
        ready: "Future[tuple[Engine, LoadedModel]]",
    ) -> None:
        try:
            engine, model = build(config)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result((engine, model))
        try:
            self._serve(engine)
        except Exception as error:
            _log.exception("the engine has failed")
            self._fail(f"the engine has failed: {type(error).__name__}: {error}")
        finally:
            open_ids = list(self._streams)
            self._end_streams(FinishReason.ABORT, None)
            with contextlib.suppress(Exception):
                self._settle(engine, open_ids)
            with contextlib.suppress(Exception):
                engine.close()

    def _serve(self, engine: Engine) -> None:
        while True:
            with self._wake:
                if not self._inbox and not self._is_closing and not self._has_work(engine):
                    self._wake.wait(_TRANSFER_CHECK_S if engine.has_transfers else None)
                if self._is_closing:
                    return
                messages = list(self._inbox)
                self._inbox.clear()
            for message in messages:
                if isinstance(message, _Submit):
                    self._enqueue(message)
                elif isinstance(message, _Abort):
                    self._drop(engine, message.stream)
                else:
                    self._answer(engine, message)
            self._expire(engine)
            self._hand_over(engine)
            if engine.has_work or engine.has_transfers:
                outputs = engine.step()
                self._note_started(engine)
                self._deliver(outputs)

    def _has_work(self, engine: Engine) -> bool:
        return engine.has_work or len(self._queue) > 0

    def _enqueue(self, submit: "_Submit") -> None:
        self._queue.push(submit.tenant, submit.priority, submit)
        submit.stream.submit = submit
        if submit.timeout_s is not None:
            deadline_s = time.monotonic() + submit.timeout_s
            heapq.heappush(self._deadlines, (deadline_s, next(self._ids), submit))

    def _hand_over(self, engine: Engine) -> None:
        """Give the engine what it may start soon: about a step's worth of prompts."""
        waiting = engine.scheduler.waiting
        num_tokens = sum(request.num_tokens for request in waiting)
        while len(self._queue) and (
            len(waiting) < _AHEAD or num_tokens < engine.config.max_num_batched_tokens
        ):
            submit = self._queue.pop()
            with self._wake:
                self._num_queued -= 1
            num_tokens += len(submit.token_ids)
            self._add(engine, submit)

    def _add(self, engine: Engine, submit: "_Submit") -> None:
        stream = submit.stream
        if stream.is_abandoned:
            stream.end(FinishReason.ABORT, None)
            return
        try:
            engine.add_request(
                submit.token_ids,
                submit.params,
                salt=submit.salt,
                priority=submit.priority,
                request_id=stream.request_id,
            )
        except RequestError as error:
            stream.end(FinishReason.ERROR, str(error))
        else:
            self._queue.charge(submit.tenant, prompt_tokens=len(submit.token_ids))
            self._streams[stream.request_id] = submit
            self._not_started[stream.request_id] = submit

    def _note_started(self, engine: Engine) -> None:
        """Queueing ends with the first step that a request is part of."""
        if not self._not_started:
            return
        now_s = time.monotonic()
        for request in engine.scheduler.running:
            submit = self._not_started.pop(request.request_id, None)
            if submit is not None:
                submit.clock.start(now_s)

    def _drop(self, engine: Engine, stream: "OutputStream", error: str | None = None) -> None:
        submit = stream.submit
        if submit is None:
            return
        if self._queue.remove(submit.tenant, submit.priority, submit):
            with self._wake:
                self._num_queued -= 1
        elif self._streams.get(stream.request_id) is submit:
            self._forget(stream.request_id)
            engine.abort(stream.request_id)
        stream.end(FinishReason.ABORT, error)

    def _expire(self, engine: Engine) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            submit = heapq.heappop(self._deadlines)[2]
            if not submit.stream.is_over:
                error = f"the request was not done within its {submit.timeout_s:g} s"
                self._drop(engine, submit.stream, error)

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._not_started.pop(request_id, None)

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        now_s = time.monotonic()
        # One call into an event loop for all its readers: each wakes the loop's thread.
        to_wake: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        for output in outputs:
            submit = self._streams.get(output.request_id)
            if submit is None:
                continue
            num_tokens = len(output.token_ids)
            submit.clock.output(output.index, num_tokens, now_s)
            self._queue.charge(submit.tenant, output_tokens=num_tokens)
            reader = submit.stream.put(output)
            if reader is not None:
                to_wake.setdefault(reader[0], []).append(reader[1])
            if submit.stream.is_over:
                submit.clock.start(now_s)
                if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                    submit.clock.end(len(submit.token_ids), now_s)
                self._finished_s.append(now_s)
                self._forget(output.request_id)
        for loop, events in to_wake.items():
            with contextlib.suppress(RuntimeError):  # the readers' loop is closed
                loop.call_soon_threadsafe(_set_all, events)

    def _answer(self, engine: Engine, look: "_Look") -> None:
        if not look.result.set_running_or_notify_cancel():
            return
        try:
            look.result.set_result(engine_status(engine, num_queued=len(self._queue)))
        except Exception as error:  # it must not cost the requests
            look.result.set_exception(error)

    def _settle(self, engine: Engine, open_ids: Sequence[str]) -> None:
        """Let what is on its way to slower tiers arrive there, for a while."""
        if self._failure is not None:
            return
        for request_id in open_ids:
            engine.abort(request_id)
        deadline_s = time.monotonic() + _SETTLE_S
        while (engine.has_work or engine.has_transfers) and time.monotonic() < deadline_s:
            engine.step()
            if not engine.has_work:
                time.sleep(0.001)

    def _fail(self, failure: str) -> None:
        with self._wake:
            self._failure = " ".join(failure.split())
        self._end_streams(FinishReason.ERROR, self._failure)

    def _end_streams(self, reason: FinishReason, error: str | None) -> None:
        with self._wake:
            messages = list(self._inbox)
            self._inbox.clear()
            self._num_queued = 0
        for message in messages:
            if isinstance(message, _Look):
                message.result.set_exception(EngineError(error or "the engine was closed"))
            else:
                message.stream.end(reason, error)
        for submit in [*self._streams.values(), *self._queue]:
            submit.stream.end(reason, error)
        self._streams.clear()
        self._not_started.clear()
        self._queue = FairQueue()


class OutputStream:
    """The outputs of one request, in order, for one reader: a thread or a task.

    Iterate it, with `for` or `async for`; the last output of each of the `n` indices has a
    finish reason. Leaving the iteration early (break, an exception, a cancelled task) aborts the
    request. Outputs wait here for a slow reader, joined to one for each index; the engine never
    waits.
    """

    def __init__(self, service: EngineService, request_id: str, n: int) -> None:
        self.request_id = request_id
        self.is_abandoned = False
        self.submit: _Submit | None = None  # set and used by the engine thread alone
        self._service = service
        self._condition = threading.Condition()
        self._outputs: dict[int, RequestOutput] = {}  # by index; what nobody has read
        self._unfinished = set(range(n))
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def is_over(self) -> bool:
        """Whether every index has its last output, be it read or not."""
        return not self._unfinished

    def abort(self) -> None:
        """Stop the request; the iteration ends soon after. Ended ones are left alone."""
        with self._condition:
            if self.is_abandoned or not self._unfinished:
                return
            self.is_abandoned = True
        self._service._abort(self)

    def __iter__(self) -> Generator[RequestOutput, None, None]:
        try:
            while True:
                with self._condition:
                    while not self._outputs and self._unfinished:
                        self._condition.wait()
                    outputs, self._outputs = self._outputs, {}
                if not outputs:
                    return
                yield from outputs.values()
        finally:
            self.abort()

    async def __aiter__(self) -> AsyncGenerator[RequestOutput, None]:
        event = asyncio.Event()
        with self._condition:
            self._reader = (asyncio.get_running_loop(), event)
        try:
            while True:
                with self._condition:
                    event.clear()
                    outputs, self._outputs = self._outputs, {}
                    is_over = not self._unfinished
                for output in outputs.values():
                    yield output
                if is_over:
                    return
                if not outputs:
                    await event.wait()
        finally:
            self.abort()

    # What follows is called from the engine thread.

    def put(
        self, output: RequestOutput
    ) -> "tuple[asyncio.AbstractEventLoop, asyncio.Event] | None":
        """Hand over an output; returns the reading task's loop and what to set in it."""
        with self._condition:
            unread = self._outputs.get(output.index)
            self._outputs[output.index] = output if unread is None else _join(unread, output)
            if output.finish_reason is not None:
                self._unfinished.discard(output.index)
            self._condition.notify()
            return self._reader

    def end(self, reason: FinishReason, error: str | None) -> None:
        """End every index that has not ended."""
        for index in sorted(self._unfinished):
            reader = self.put(RequestOutput(self.request_id, index, "", (), reason, error))
            if reader is not None:
                with contextlib.suppress(RuntimeError):  # the reader's loop is closed
                    reader[0].call_soon_threadsafe(reader[1].set)


def _join(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Two outputs of one index, one after the other, as one."""
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        prompt_tokens=max(first.prompt_tokens, second.prompt_tokens),
        cached_tokens=max(first.cached_tokens, second.cached_tokens),
    )


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


@dataclass(frozen=True, slots=True, eq=False)
class _Submit:
    stream: OutputStream
    token_ids: list[int]
    params: SamplingParams
    salt: bytes
    priority: int
    tenant: str
    timeout_s: float | None
    clock: RequestClock


@dataclass(frozen=True, slots=True)
class _Abort:
    stream: OutputStream


@dataclass(frozen=True, slots=True)
class _Look:
    result: "Future[EngineStatus]"
