"""The engine: one step after another, from queued requests to tokens.

Imports numpy, no torch.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hotset.clock import Clock
from hotset.cost.rates import Rates
from hotset.engine.arrivals import check_tokens, make_requests
from hotset.engine.messages import Submit
from hotset.engine.outputs import OutputProcessor
from hotset.engine.scheduler import Scheduler
from hotset.engine.sizing import Sizes
from hotset.engine.step import Step
from hotset.engine.step_cost import StepCost
from hotset.engine.step_input import make_step_input
from hotset.errors import ExpertReadError, RequestError
from hotset.executor.executor import Executor, Pending
from hotset.executor.step_input import StepInput
from hotset.options import Options
from hotset.request import FinishReason, RequestOutput, Resumed, SamplingParams
from hotset.sequence import UNKNOWN_TOKEN, Request

if TYPE_CHECKING:
    from hotset.engine.split_mover import SplitMover
    from hotset.experts.buffer import ExpertBuffer
    from hotset.experts.recorder import RoutingRecorder
    from hotset.memory.tiers import TierStack

_log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.05
# Fetches that are submitted beside a step take at most this part of the time of one: the next
# step's inputs are copied behind them, by the same engine of the device.
_LINK_SHARE = 0.8
_RECENT_STEPS = 4
_NOT_FINITE = (
    "the model's logits for the next token are NaN or infinite, so no token can be chosen; nothing "
    "of the request is kept"
)
# A step of mostly prefill, with at least this many tokens of it, tells the prefill rate.
_PREFILL_STEP_TOKENS = 32


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine runs with, all of it ready. Made by `engine.build`.

    Attributes:
        options: as the user asked.
        sizes: what they come to here.
        report: what went where, to be told at start.
        overlaps: whether one step is prepared while the last one runs.
        executor: runs the steps.
        experts: None where all stay on the device as they were loaded.
        tiers: below the device's KV; None where there are none.
        mover: None where the split between experts and KV stays.
        clock: of the scheduler too.
    """

    options: Options
    sizes: Sizes
    report: str
    overlaps: bool
    executor: Executor
    outputs: OutputProcessor
    scheduler: Scheduler
    rates: Rates
    step_cost: StepCost
    experts: "ExpertBuffer | None"
    tiers: "TierStack | None"
    mover: "SplitMover | None"
    clock: Clock


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    """A step that was submitted; `requests` are those whose next token it chooses, in order."""

    step: Step
    requests: list[Request]
    message: StepInput
    pending: Pending


class Engine:
    """Runs requests over one model and its KV tiers. Not thread-safe: see `service`.

    On a GPU steps overlap: while one runs, the host takes in the tokens of the one before and
    prepares the next, whose unknown tokens the device reads where it writes them. A request that
    turns out to have ended has then computed one token too many, which is dropped.

    Args:
        parts: what it runs with; it closes them.

    Attributes:
        tiers, experts: see `EngineParts`.
    """

    def __init__(self, parts: EngineParts) -> None:
        self.options, self.sizes, self.report = parts.options, parts.sizes, parts.report
        self.max_model_len = parts.sizes.max_model_len
        self.scheduler, self.rates = parts.scheduler, parts.rates
        self.kv = parts.scheduler.kv
        self.metrics = self.scheduler.metrics
        self.executor, self._outputs, self._clock = parts.executor, parts.outputs, parts.clock
        self.step_cost = parts.step_cost
        self.tiers, self.experts, self._mover = parts.tiers, parts.experts, parts.mover
        self._overlaps = parts.overlaps
        self._in_flight: _StepInFlight | None = None
        self._recent_step_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._num_host_bound = 0
        self._requests: dict[str, list[Request]] = {}  # those of `n` that have not ended
        self._ids = itertools.count()
        self._warm_up_start_s = parts.clock.now()

    @property
    def is_warming(self) -> bool:
        """Whether steps will get faster by `warm_up`."""
        return self.executor.is_warming

    def warm_up(self) -> tuple[bool, str | None]:
        """Do the next piece of what a start left out; to be called between two steps.

        Returns:
            Whether anything was done, which it is not while kernels are still being compiled; and
            at the end of all a line to be told.

        Raises:
            ModelError: the layers cannot be compiled on this machine.
        """
        did = self.executor.warm_up()
        if self.is_warming:
            return did, None
        seconds = self._clock.now() - self._warm_up_start_s
        return did, f"warm: all kernels built and steps recorded, {seconds:.1f} s after the start"

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: requests, or outputs that were not taken."""
        return self.scheduler.has_requests or self._outputs.has_outputs

    @property
    def has_transfers(self) -> bool:
        """Whether copies between tiers are under way or due; `step` takes note of their end."""
        return self.kv.has_transfers

    def drain_tiers(self) -> None:
        """Have what host memory has written to the slowest tier, by the steps from here on.

        First what the requests that are here have computed: these are about to move, and look for
        it elsewhere.
        """
        if self.tiers is not None:
            requests = [*self.scheduler.running, *self.scheduler.waiting]
            self.tiers.begin_drain([key for one in requests for key in self.kv.keys(one)])

    def validate(
        self, token_ids: Sequence[int], params: SamplingParams, resumed: Sequence[Resumed] = ()
    ) -> None:
        """Check a request without queueing it. May be called from any thread.

        Raises:
            RequestError: the request can never be served.
        """
        check_tokens(
            token_ids,
            params,
            resumed,
            vocab_size=self.executor.vocab_size,
            max_model_len=self.max_model_len,
        )
        self._outputs.check(token_ids, params, resumed)
        self.executor.validate(params, [one.token_ids for one in resumed])

    def add_request(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        salt: bytes = b"",
        priority: int = 0,
        tenant: str = "",
        request_id: str | None = None,
        snapshot_at: Sequence[int] = (),
        resumed: Sequence[Resumed] = (),
    ) -> str:
        """Check and queue a prompt; its outputs carry the returned id. See `Submit`.

        Raises:
            RequestError: the request can never be served; nothing was queued.
        """
        self.validate(token_ids, params, resumed)
        submit = Submit(
            request_id or f"request-{next(self._ids)}",
            token_ids,
            params,
            salt=salt,
            priority=priority,
            tenant=tenant,
            snapshot_at=snapshot_at,
            resumed=resumed,
        )
        self.add(submit)
        return submit.request_id

    def add(self, submit: Submit) -> None:
        """Queue a request that `validate` let through.

        Requests with another salt cannot find each other's blocks. Those of one tenant share what
        each tenant gets of the steps.

        Raises:
            RequestError: its id cannot be used; nothing was queued.
        """
        request_id = submit.request_id
        if "#" in request_id or request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use or has a '#' in it")
        groups = make_requests(
            submit, max_model_len=self.max_model_len, arrival_s=self._clock.now()
        )
        self._requests[request_id] = requests = [one for group in groups for one in group]
        for request in requests:
            self._num_host_bound += _is_host_bound(request.params)
            self._outputs.add(request)
        if not submit.resumed:
            self.metrics.prompt_tokens += len(submit.token_ids)
        for group in groups:
            if submit.peer is not None:
                self.kv.expect(group[0], submit.peer)
            self.scheduler.add(group)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request (all its `n` outputs); its blocks are free when this returns."""
        for request in list(self._requests.get(request_id, ())):
            self._finish(request, reason)

    def step(self, *, num_queued: int = 0) -> list[RequestOutput]:
        """Run one model step and return the outputs it produced, streamed or final.

        Where steps overlap, these are the outputs of the step before. `num_queued` more requests
        wait elsewhere for this engine.
        """
        self._prepare(num_queued)
        step = self.scheduler.schedule()  # which requests, how many tokens each
        started = self._submit(step)  # on the device, with the copies between tiers beside it
        self._collect()  # the tokens of the step before, while this one runs
        if started is not None:
            self._commit(started)
        outputs = self._outputs.take()
        if not self.scheduler.has_requests:
            self.take_counts()
        return outputs

    def take_counts(self) -> None:
        """Bring the metrics of experts and of hot requests up to date; waits for the device."""
        experts, hot = self.executor.expert_counts(), self.executor.hot_counts()
        if experts is not None:
            self.metrics.take_experts(experts)
        if hot is not None:
            self.metrics.take_hot(hot)

    def record_routing(self, recorder: "RoutingRecorder | None") -> None:
        """Tell `recorder`, which was there before this engine, of each step from now on."""
        self.executor.record_routing(recorder)

    def close(self) -> None:
        """End the transfers and close the tiers."""
        try:
            if self.tiers is not None:
                self.tiers.close()
        finally:
            self.executor.close()

    def _prepare(self, num_queued: int) -> None:
        """Between two steps: take note of what ended, and move what follows the load."""
        if self._num_host_bound:
            self._collect()  # the next step needs the last one's tokens on the host
        self.kv.poll()
        self.kv.asking.wait()
        if self._mover is not None:
            self._mover.step(num_queued=num_queued)

    def _submit(self, step: Step) -> _StepInFlight | None:
        """Start a step, and the spills and fetches asked for so far beside it.

        None where there is nothing to compute, or where it failed.
        """
        tiers = self.tiers
        if not step.items:
            if step.copies:  # of blocks that were given back, and may be filled from now on
                self.executor.copy_blocks(step.copies)
            if tiers is not None:
                tiers.flush()
            if self._in_flight is None and self.scheduler.has_requests:
                self._wait_for_tiers()
            return None
        if tiers is None:
            return self._start(step)
        if not self._overlaps:
            # Before a fetch fills what was given back, from which they copy.
            self.executor.copy_blocks(step.copies)
            tiers.flush()
            return self._start(replace(step, copies=[]))
        # Copies to the device run one after another, whatever their stream: those of this step's
        # inputs go first, and the others end before the next step's come.
        started = self._start(step, when_ready=tiers.mark)
        most_s = _LINK_SHARE * min(self._recent_step_s, default=0.0)
        tiers.flush(after_mark=started is not None, most_s=most_s)
        return started

    def _start(
        self, step: Step, when_ready: Callable[[], None] = lambda: None
    ) -> _StepInFlight | None:
        """Hand a step to the executor; None where it failed. See `Executor.submit`."""
        message = make_step_input(step, self.kv.block_size)
        try:
            pending = self.executor.submit(message, when_ready)
        except ExpertReadError as error:
            # Nobody can say before the step has run which of its requests needed the expert.
            _log.error("a step of %d requests failed: %s", len(step.items), error)
            self.metrics.faults.update(self.executor.take_faults())
            self.scheduler.step_failed(step)
            for item in step.items:
                self._finish(item.request, FinishReason.ERROR, str(error))
            return None
        except (RuntimeError, MemoryError) as error:
            # Out of memory, most likely. The youngest request of the step pays; the others'
            # tokens are computed again.
            _log.exception("a step of %d requests failed", len(step.items))
            self.metrics.faults["step_failed"] += 1
            self.scheduler.step_failed(step)
            victim = step.items[-1].request
            self._finish(victim, FinishReason.ERROR, f"the model step failed: {error}")
            return None
        requests = [item.request for item in step.items if item.samples]
        return _StepInFlight(step, requests, message, pending)

    def _commit(self, started: _StepInFlight) -> None:
        """Take the step's KV as written: what reads it is submitted later."""
        self.scheduler.commit(started.step)
        for row, request in enumerate(started.requests):
            if not request.is_finished:
                request.token_ids.append(UNKNOWN_TOKEN)
                request.pending_row = row
        self._in_flight = started
        if not self._overlaps:
            self._collect()

    def _collect(self) -> None:
        """Wait for the tokens of the step in flight, if there is one, and hand them out."""
        ended, self._in_flight = self._in_flight, None
        if ended is None:
            return
        result = ended.pending.wait()
        for scored, logprobs in zip(ended.message.scored, result.prompt_logprobs, strict=True):
            self._outputs.score(scored.sequence_id, logprobs)
        for request, token_id, logprob in zip(
            ended.requests, result.token_ids, result.logprobs, strict=True
        ):
            if request.is_finished:
                continue
            request.token_ids[-1] = token_id
            request.pending_row = None
            if request.sequence_id in result.not_finite:
                _log.error("logits of request %s are not finite", request.request_id)
                self.metrics.faults["not_finite"] += 1
                self._finish(request, FinishReason.ERROR, _NOT_FINITE, keeps_kv=False)
                continue
            self.metrics.output_tokens += request.params.max_tokens != 0
            reason = self._outputs.append(request, token_id, logprob)
            error = result.errors.get(request.sequence_id)
            if error is not None:
                self._finish(request, FinishReason.ERROR, error)
            elif reason is not None:
                self._finish(request, reason)
        self._observe(ended.message, result.seconds)

    def _observe(self, step: StepInput, seconds: float) -> None:
        num_tokens, prompt_tokens = step.num_tokens, step.num_prompt_tokens
        self.metrics.steps += 1
        self.metrics.step_s += seconds
        if prompt_tokens:
            self.metrics.prompt_step_s += seconds
        self._recent_step_s.append(seconds)
        self.metrics.computed_tokens += num_tokens
        self.step_cost.observe(prompt_tokens, seconds)
        if prompt_tokens >= _PREFILL_STEP_TOKENS and 2 * prompt_tokens >= num_tokens:
            self.rates.observe_prefill(num_tokens, seconds)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        error: str | None = None,
        *,
        keeps_kv: bool = True,
    ) -> None:
        if request.is_finished:
            return
        self.scheduler.finish(request, reason, error, keeps_kv=keeps_kv)
        self.executor.release(request.sequence_id)
        self._outputs.finish(request, reason, error)
        self.metrics.requests_finished[reason.value] += 1
        self._num_host_bound -= _is_host_bound(request.params)
        siblings = self._requests[request.request_id]
        siblings.remove(request)
        if not siblings:
            del self._requests[request.request_id]

    def _wait_for_tiers(self) -> None:
        """Wait for a transfer: no request can go on before. Without one, it is a bug of ours."""
        if self.tiers is not None and self.tiers.is_busy:
            self.tiers.wait(_IDLE_WAIT_S)
            return
        assert not self.scheduler.running, "running requests wait for nothing"
        request = self.scheduler.waiting[0]
        blocks = self.kv.tables.num_blocks_for(request.num_tokens)
        self._finish(
            request,
            FinishReason.ERROR,
            f"{blocks} KV blocks are needed and {self.kv.tables.num_available} can be had",
        )


def _is_host_bound(params: SamplingParams) -> bool:
    """Whether a request's next token cannot be chosen before the host has seen the last one."""
    return params.has_penalties or params.has_form
