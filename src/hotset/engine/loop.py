"""The loop around the engine's steps, in a thread: requests in, reports of what came out."""

import contextlib
import heapq
import itertools
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from hotset.clock import REAL_CLOCK, Clock
from hotset.engine.engine import Engine
from hotset.engine.fair_queue import FairQueue
from hotset.engine.following import Following
from hotset.engine.messages import BuildEngine, EngineInfo, Report, Submit
from hotset.engine.outbox import Outbox
from hotset.engine.output_text import OutputText
from hotset.engine.run import run_steps, settle
from hotset.engine.status import EngineStatus, engine_status
from hotset.engine.urgency import MUCH_LONGER
from hotset.errors import DrainingError, EngineError, OverloadedError, RequestError
from hotset.metrics import Metrics
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import FinishReason, RequestOutput

_log = logging.getLogger(__name__)

# With no request left, how often the engine takes note of copies that still run between tiers.
_TRANSFER_CHECK_S = 0.05
# At the end, how long copies between tiers may take to arrive where a restart finds them.
_SETTLE_S = 5.0
# The same of an engine that was drained: what host memory has goes to the slowest tier.
_DRAIN_S = 60.0
# Requests handed to the engine before it has room, so that it can stage their blocks.
_AHEAD = 8
# How often to look whether kernels that are being compiled are there.
_KERNEL_CHECK_S = 0.1
_RATE_WINDOW_S = 30.0
_MOST_RETRY_AFTER_S = 60


@dataclass(eq=False, slots=True)
class _Entry:
    """A request that has not ended, queued here or in the engine."""

    submit: Submit
    unfinished: set[int]  # output indices
    texts: Mapping[int, OutputText]  # of those that go on


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Look:
    look_id: int


@dataclass(frozen=True, slots=True)
class _Drain:
    drain_s: float


@dataclass(frozen=True, slots=True)
class _Follow:
    is_on: bool


class EngineLoop:
    """Runs an engine in one background thread.

    The engine is built, used and closed in that thread alone. The constructor returns when it
    is ready. Requests wait here, in fair order between tenants, and the engine gets those that
    it can soon start.

    Args:
        options: what to load and how.
        build: makes the engine.
        on_report: called from the engine's thread; must not block.
        clock: what deadlines, and the times of reports, are told by.

    Raises:
        HotsetError: the engine cannot be built; no thread is left.
    """

    def __init__(
        self,
        options: Options,
        build: BuildEngine,
        on_report: Callable[[Report], None],
        clock: Clock = REAL_CLOCK,
    ) -> None:
        self._on_report, self._clock = on_report, clock
        self._wake = threading.Condition()
        self._inbox: deque[_Entry | _Abort | _Look | _Drain | _Follow] = deque()  # by _wake
        self._num_queued = 0  # requests the engine has not got; guarded by _wake
        self._is_closing = False  # guarded by _wake
        self._is_draining = False  # guarded by _wake
        # What follows is used by the engine thread alone.
        self._entries: dict[str, _Entry] = {}
        self._queue: FairQueue[_Entry] = FairQueue()
        self._not_started: set[str] = set()  # of those the engine has
        self._deadlines: list[tuple[float, int, _Entry]] = []  # a heap
        self._moves_at_s = math.inf  # when those that are left end as moved
        self._numbers = itertools.count()
        self._finished_s: deque[float] = deque(maxlen=1024)
        self._outbox = Outbox()
        self._did_warm_up = True
        self._warm_up_due_s = 0.0
        ready: Future[tuple[Engine, LoadedModel]] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(options, build, ready), name="hotset-engine", daemon=True
        )
        self._thread.start()
        try:
            self._engine, self.model = ready.result()
        except BaseException:  # Ctrl-C included: the thread ends once the engine is built
            self._request_close()
            raise
        engine = self._engine
        self.info = EngineInfo(
            engine.options,
            engine.max_model_len,
            engine.report,
            engine.kv.states is not None,
            engine.kv.prefixes.fingerprint,
            engine.kv.block_size,
            engine.sizes.block_bytes // engine.kv.block_size,
            engine.numerics,
        )

    @property
    def is_alive(self) -> bool:
        """See `EngineHost`."""
        return self._thread.is_alive()

    @property
    def metrics(self) -> Metrics:
        """The engine's counters; they change while one reads."""
        return self._engine.metrics

    def submit(self, submit: Submit) -> None:
        """See `EngineHost`."""
        texts = self._engine.validate(submit.token_ids, submit.params, submit.resumed)
        indices = {one.index for one in submit.resumed} or set(range(submit.params.n))
        entry = _Entry(submit, indices, texts)
        with self._wake:
            if self._is_draining:
                raise DrainingError("the engine takes no more requests: it is about to end")
            limit = None if submit.resumed else submit.queue_limit
            if limit is not None and self._num_queued >= limit:
                raise OverloadedError(
                    f"{self._num_queued} requests wait already; try again later",
                    self._retry_after_s(),
                )
            self._num_queued += 1
            self._inbox.append(entry)
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """See `EngineHost`."""
        self._send(_Abort(request_id))

    def look(self, look_id: int) -> None:
        """See `EngineHost`."""
        self._send(_Look(look_id))

    def drain(self, drain_s: float) -> None:
        """See `EngineHost`."""
        with self._wake:
            self._is_draining = True
        self._send(_Drain(drain_s))

    def follow(self, is_on: bool) -> None:
        """See `EngineHost`."""
        self._send(_Follow(is_on))

    def close(self) -> None:
        """See `EngineHost`."""
        self._request_close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _send(self, message: _Abort | _Look | _Follow | _Drain) -> None:
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    def _request_close(self) -> None:
        with self._wake:
            self._is_closing = True
            self._wake.notify()

    def _retry_after_s(self) -> int:
        """How long the queue should take, at the recent pace."""
        now_s = self._clock.now()
        recent = [s for s in list(self._finished_s) if s > now_s - _RATE_WINDOW_S]
        if not recent:
            return 1
        seconds = self._num_queued * (now_s - recent[0]) / len(recent)
        return max(1, min(_MOST_RETRY_AFTER_S, round(seconds)))

    # What follows runs in the engine thread.

    def _run(
        self,
        options: Options,
        build: BuildEngine,
        ready: "Future[tuple[Engine, LoadedModel]]",
    ) -> None:
        try:
            engine, model = build(options)
            with contextlib.ExitStack() as undo:
                undo.callback(engine.close)
                self._following = Following(engine, self._clock)
                undo.pop_all()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result((engine, model))
        try:
            self._serve(engine)
        except BaseException as error:  # SystemExit too: readers wait for a last report
            _log.exception("the engine has failed")
            failure = f"the engine has failed: {type(error).__name__}: {error}"
            if isinstance(error, EngineError):  # a rank's, which says all there is
                failure = str(error)
            failure = " ".join(failure.split())
            self._on_report(Report(self._clock.now(), failure=failure))
        else:
            with contextlib.suppress(Exception):
                for request_id in list(self._entries):
                    engine.abort(request_id)
                settle(engine, _SETTLE_S, self._clock)
                if self._is_draining:
                    self._end_drain(engine)
        finally:
            with contextlib.suppress(Exception):
                self._following.close()
            with contextlib.suppress(Exception):
                engine.close()

    def _end_drain(self, engine: Engine) -> None:
        """Write what requests left at their ends, too, such as states."""
        engine.drain_tiers()
        settle(engine, _DRAIN_S, self._clock)
        if num := sum(lane.tiers.num_to_drain for lane in engine.lanes if lane.tiers is not None):
            note = f"{num} KV blocks were not written in time; others compute them again"
            self._on_report(Report(self._clock.now(), notes=[note]))

    def _serve(self, engine: Engine) -> None:
        for outputs in run_steps(engine, partial(self._feed, engine)):
            self._note_started(engine)
            self._take(outputs)
            if engine.is_warming:
                self._warm_up(engine)
            self._outbox.journal, self._outbox.load = self._following.news(len(self._entries))
            if not self._outbox.is_empty:
                self._on_report(self._outbox.take(self._clock.now()))

    def _feed(self, engine: Engine) -> int | None:
        """Take messages in, and give the engine requests; see `run_steps`."""
        with self._wake:
            has_work = engine.has_work or len(self._queue) > 0
            if not self._inbox and not self._is_closing and not has_work:
                self._wake.wait(self._idle_wait_s(engine))
            if self._is_closing:
                return None
            messages = list(self._inbox)
            self._inbox.clear()
        for message in messages:
            if isinstance(message, _Entry):
                self._enqueue(engine, message)
            elif isinstance(message, _Abort):
                self._drop(engine, message.request_id)
            elif isinstance(message, _Drain):
                self._moves_at_s = min(self._moves_at_s, self._clock.now() + message.drain_s)
                self._outbox.is_draining = True
                engine.drain_tiers()
            elif isinstance(message, _Follow):
                self._following.follow(message.is_on)
            else:
                self._look_at(engine, message.look_id)
        self._expire(engine)
        self._hand_over(engine)
        if self._outbox.taken:  # a request may end the process in its first step
            self._on_report(self._outbox.take(self._clock.now()))
        return len(self._queue)

    def _warm_up(self, engine: Engine) -> None:
        """Do a piece of it; beside requests, their steps get as much time as it does."""
        start_s = self._clock.now()
        if engine.has_work and start_s < self._warm_up_due_s:
            return
        self._did_warm_up, note = engine.warm_up()
        end_s = self._clock.now()
        self._warm_up_due_s = end_s + (end_s - start_s)
        if note is not None:
            self._outbox.notes.append(note)

    def _idle_wait_s(self, engine: Engine) -> float | None:
        """How long to wait for a message when no request is there; None is until one comes."""
        if engine.is_warming:
            return 0.0 if self._did_warm_up else _KERNEL_CHECK_S
        return self._following.wait_s(_TRANSFER_CHECK_S if engine.has_transfers else None)

    def _enqueue(self, engine: Engine, entry: _Entry) -> None:
        submit = entry.submit
        self._entries[submit.request_id] = entry
        self._following.arrive(submit)
        if submit.timeout_s is not None:
            deadline_s = self._clock.now() + submit.timeout_s
            heapq.heappush(self._deadlines, (deadline_s, next(self._numbers), entry))
        if submit.resumed:  # its user waits in the middle of an answer
            self._begin(engine, entry)
        else:
            size = len(submit.token_ids)
            self._queue.push(submit.tenant, submit.priority, entry, size=size)

    def _hand_over(self, engine: Engine) -> None:
        """Give the engine what it may start soon: about a step's worth of prompts.

        Much longer ones that wait there already do not count: a short one may overtake them.
        """
        if not len(self._queue):
            return
        # Preempted requests wait for memory; their number says nothing about new ones.
        waiting = (one for lane in engine.lanes for one in lane.scheduler.waiting)
        fresh = [one.num_tokens for one in waiting if not one.queue.num_preemptions]
        schedule = engine.options.schedule
        # Where users take turns, the engine gives one to each that it knows of.
        ahead = _AHEAD if schedule.rotation_s is None else schedule.max_num_seqs
        while len(self._queue):
            most = MUCH_LONGER * len(self._queue.peek().submit.token_ids)
            before = [num_tokens for num_tokens in fresh if num_tokens < most]
            if len(before) >= ahead and sum(before) >= schedule.max_num_batched_tokens:
                return
            entry = self._queue.pop()
            num_tokens = len(entry.submit.token_ids)
            fresh.append(num_tokens)
            if self._begin(engine, entry):
                self._queue.charge(entry.submit.tenant, prompt_tokens=num_tokens)

    def _begin(self, engine: Engine, entry: _Entry) -> bool:
        """Give a request to the engine; returns whether it takes it."""
        with self._wake:
            self._num_queued -= 1
        try:
            engine.add(entry.submit, entry.texts)
        except RequestError as error:
            self._end(entry, FinishReason.ERROR, str(error))
            return False
        self._not_started.add(entry.submit.request_id)
        self._outbox.taken.append(entry.submit.request_id)
        return True

    def _note_started(self, engine: Engine) -> None:
        """Queueing ends with the first step that a request is part of."""
        if not self._not_started:
            return
        for request in (one for lane in engine.lanes for one in lane.scheduler.running):
            if request.request_id in self._not_started:
                self._not_started.discard(request.request_id)
                self._following.start(request.request_id)
                self._outbox.started.append(request.request_id)

    def _drop(
        self,
        engine: Engine,
        request_id: str,
        reason: FinishReason = FinishReason.ABORT,
        error: str | None = None,
    ) -> None:
        entry = self._entries.get(request_id)
        if entry is None:
            return
        if self._queue.remove(entry.submit.tenant, entry.submit.priority, entry):
            with self._wake:
                self._num_queued -= 1
        else:
            engine.abort(request_id, reason)
        self._end(entry, reason, error)

    def _expire(self, engine: Engine) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._clock.now():
            submit = heapq.heappop(self._deadlines)[2].submit
            error = f"the request was not done within its {submit.timeout_s:g} s"
            self._drop(engine, submit.request_id, error=error)
        if self._entries and self._clock.now() >= self._moves_at_s:
            engine.drain_tiers()
            for request_id in list(self._entries):
                self._drop(engine, request_id, FinishReason.MOVED)

    def _end(self, entry: _Entry, reason: FinishReason, error: str | None) -> None:
        """End a request's outputs that have not ended."""
        request_id = entry.submit.request_id
        for index in sorted(entry.unfinished):
            self._outbox.outputs.append(RequestOutput(request_id, index, "", (), reason, error))
        self._forget(request_id)

    def _take(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            entry = self._entries.get(output.request_id)
            if entry is None:
                continue
            self._queue.charge(entry.submit.tenant, output_tokens=len(output.token_ids))
            self._outbox.outputs.append(output)
            if output.finish_reason is not None:
                entry.unfinished.discard(output.index)
                if not entry.unfinished:
                    self._finished_s.append(self._clock.now())
                    self._forget(output.request_id)

    def _forget(self, request_id: str) -> None:
        del self._entries[request_id]
        self._not_started.discard(request_id)
        self._following.start(request_id)

    def _look_at(self, engine: Engine, look_id: int) -> None:
        try:
            seen: EngineStatus | str = engine_status(engine, num_queued=len(self._queue))
        except Exception as error:  # it must not cost the requests
            _log.exception("the engine cannot be looked at")
            seen = f"the engine cannot be looked at: {error}"
        self._outbox.looks.append((look_id, seen))
