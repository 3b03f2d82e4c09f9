"""The engine: one step after another, from queued requests to tokens.

Imports numpy, no torch.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hotset.engine.arrivals import check_tokens, make_requests
from hotset.engine.lane import choose_lane
from hotset.engine.messages import Submit
from hotset.engine.output_text import OutputText
from hotset.engine.parts import EngineParts
from hotset.engine.scheduler import Scheduler
from hotset.engine.step import Step
from hotset.engine.step_cost import context_cost
from hotset.engine.step_input import make_step_input
from hotset.errors import ExpertReadError, RequestError
from hotset.executor.executor import Pending
from hotset.executor.step_input import StepInput
from hotset.kv.cache import KVCache
from hotset.request import FinishReason, RequestOutput, Resumed, SamplingParams
from hotset.sequence import UNKNOWN_TOKEN, Request

if TYPE_CHECKING:
    from hotset.experts.recorder import RoutingRecorder
    from hotset.memory.tiers import TierStack

_log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.05
_SHARED_WAIT_S = 0.001  # where another lane's transfer may end first
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
class _StepInFlight:
    """A step that was submitted, of each lane; it chooses the next tokens of `requests`."""

    steps: Sequence[Step]
    requests: list[Request]
    messages: Sequence[StepInput]
    pending: Pending


class Engine:
    """Runs requests over one model and its KV tiers. Not thread-safe: see `service`.

    On a GPU steps overlap: while one runs, the host takes in the tokens of the one before and
    prepares the next, whose unknown tokens the device reads where it writes them. A request that
    turns out to have ended has then computed one token too many, which is dropped.

    Args:
        parts: what it runs with; it closes them.

    Attributes:
        numerics, lanes, experts, memory: see `EngineParts`.
        context_cost: what a token of a prompt takes, by the number of tokens before it.
    """

    def __init__(self, parts: EngineParts) -> None:
        self.options, self.sizes, self.report = parts.options, parts.sizes, parts.report
        self.numerics, self.max_model_len = parts.numerics, parts.sizes.max_model_len
        self.lanes, self.rates = parts.lanes, parts.rates
        self.metrics = self.scheduler.metrics
        self.executor, self._outputs, self._clock = parts.executor, parts.outputs, parts.clock
        self.step_cost, self.context_cost = parts.step_cost, context_cost()
        self.memory = parts.memory
        self.experts, self._mover = parts.experts, parts.mover
        self._tiers = [lane.tiers for lane in self.lanes if lane.tiers is not None]
        self._overlaps = parts.overlaps
        self._in_flight: _StepInFlight | None = None
        self._recent_step_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._num_host_bound = 0
        self._requests: dict[str, list[Request]] = {}  # those of `n` that have not ended
        self._ids = itertools.count()
        self._warm_up_start_s = parts.clock.now()

    @property
    def scheduler(self) -> Scheduler:
        """Of the first lane, which most engines have alone."""
        return self.lanes[0].scheduler

    @property
    def kv(self) -> KVCache:
        """Of the first lane."""
        return self.lanes[0].kv

    @property
    def tiers(self) -> "TierStack | None":
        """Of the first lane."""
        return self.lanes[0].tiers

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
        return self._has_requests or self._outputs.has_outputs

    @property
    def has_transfers(self) -> bool:
        """Whether copies between tiers are under way or due; `step` takes note of their end."""
        return any(lane.kv.has_transfers for lane in self.lanes)

    @property
    def _has_requests(self) -> bool:
        return any(lane.scheduler.has_requests for lane in self.lanes)

    def drain_tiers(self) -> None:
        """Have what host memory has written to the slowest tier, by the steps from here on.

        First what the requests that are here have computed: these are about to move, and look for
        it elsewhere.
        """
        for lane in self.lanes:
            if lane.tiers is not None:
                requests = [*lane.scheduler.running, *lane.scheduler.waiting]
                lane.tiers.begin_drain([key for one in requests for key in lane.kv.keys(one)])

    def validate(
        self, token_ids: Sequence[int], params: SamplingParams, resumed: Sequence[Resumed] = ()
    ) -> dict[int, OutputText]:
        """Check a request without queueing it. May be called from any thread.

        Returns:
            The texts of outputs that go on, by their indices, for `add`.

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
        texts = self._outputs.resume(token_ids, params, resumed)
        self.executor.validate(params, [one.token_ids for one in resumed])
        return texts

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
        texts = self.validate(token_ids, params, resumed)
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
        self.add(submit, texts)
        return submit.request_id

    def add(self, submit: Submit, texts: Mapping[int, OutputText]) -> None:
        """Queue a request that `validate` let through and returned `texts` of.

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
            self._outputs.add(request, texts.get(request.index))
        if not submit.resumed:
            self.metrics.prompt_tokens += len(submit.token_ids)
        for group in groups:
            number = choose_lane(self.lanes, group[0])
            for request in group:
                request.lane = number
            if submit.peer is not None:
                self.lanes[number].kv.expect(group[0], submit.peer)
            self.lanes[number].scheduler.add(group)

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
        # By lane, which requests, and how many tokens of each.
        steps = [lane.scheduler.schedule() for lane in self.lanes]
        started = self._submit(steps)  # on the device, with the copies between tiers beside it
        self._collect()  # the tokens of the step before, while this one runs
        if started is not None:
            self._commit(started)
        outputs = self._outputs.take()
        if not self._has_requests:
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
            for tiers in self._tiers:
                tiers.close()
        finally:
            self.executor.close()

    def _prepare(self, num_queued: int) -> None:
        """Between two steps: take note of what ended, and move what follows the load."""
        if self._num_host_bound:
            self._collect()  # the next step needs the last one's tokens on the host
        for tiers in self._tiers:
            tiers.is_idle = not self._has_requests
        for lane in self.lanes:
            lane.kv.poll()
            lane.kv.asking.wait()
        if self._mover is not None:
            self._mover.step(num_queued=num_queued)

    def _submit(self, steps: Sequence[Step]) -> _StepInFlight | None:
        """Start a step of each lane, and the spills and fetches asked for so far beside it.

        None where there is nothing to compute, or where it failed.
        """
        copies = [step.copies for step in steps]
        if not any(step.items for step in steps):
            if any(copies):  # of blocks that were given back, and may be filled from now on
                self.executor.copy_blocks(copies)
            for tiers in self._tiers:
                tiers.flush()
            if self._in_flight is None and self._has_requests:
                self._wait_for_tiers()
            return None
        if not self._tiers:
            return self._start(steps)
        if not self._overlaps:
            # Before a fetch fills what was given back, from which they copy.
            self.executor.copy_blocks(copies)
            for tiers in self._tiers:
                tiers.flush()
            return self._start([replace(step, copies=[]) for step in steps])
        # Copies to the device run one after another, whatever their stream: those of this step's
        # inputs go first, and the others end before the next step's come.
        started = self._start(steps, when_ready=self._mark)
        most_s = _LINK_SHARE * min(self._recent_step_s, default=0.0)
        for tiers in self._tiers:
            tiers.flush(after_mark=started is not None, most_s=most_s)
        return started

    def _mark(self) -> None:
        for tiers in self._tiers:
            tiers.mark()

    def _start(
        self, steps: Sequence[Step], when_ready: Callable[[], None] = lambda: None
    ) -> _StepInFlight | None:
        """Hand a step to the executor; None where it failed. See `Executor.submit`."""
        messages = [make_step_input(step, self.sizes.block_size) for step in steps]
        items = [item for step in steps for item in step.items]
        try:
            pending = self.executor.submit(messages, when_ready)
        except ExpertReadError as error:
            # Nobody can say before the step has run which of its requests needed the expert.
            _log.error("a step of %d requests failed: %s", len(items), error)
            self.metrics.faults.update(self.executor.take_faults())
            self._take_back(steps)
            for item in items:
                self._finish(item.request, FinishReason.ERROR, str(error))
            return None
        except (RuntimeError, MemoryError) as error:
            # Out of memory, most likely. The youngest request of the step pays; the others'
            # tokens are computed again.
            _log.exception("a step of %d requests failed", len(items))
            self.metrics.faults["step_failed"] += 1
            self._take_back(steps)
            victim = items[-1].request
            self._finish(victim, FinishReason.ERROR, f"the model step failed: {error}")
            return None
        return _StepInFlight(
            steps, [item.request for item in items if item.samples], messages, pending
        )

    def _take_back(self, steps: Sequence[Step]) -> None:
        for lane, step in zip(self.lanes, steps, strict=True):
            lane.scheduler.step_failed(step)

    def _commit(self, started: _StepInFlight) -> None:
        """Take the step's KV as written: what reads it is submitted later."""
        for lane, step in zip(self.lanes, started.steps, strict=True):
            lane.scheduler.commit(step)
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
        of_prompts = [one for message in ended.messages for one in message.scored]
        for scored, logprobs in zip(of_prompts, result.prompt_logprobs, strict=True):
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
        self._observe(ended.messages, result.seconds)

    def _observe(self, messages: Sequence[StepInput], seconds: float) -> None:
        # The others wait for the lane that has the most.
        num_tokens = max(one.num_tokens for one in messages)
        prompt_tokens = max(one.num_prompt_tokens for one in messages)
        self.metrics.steps += 1
        self.metrics.step_s += seconds
        if prompt_tokens:
            self.metrics.prompt_step_s += seconds
        self._recent_step_s.append(seconds)
        self.metrics.computed_tokens += sum(one.num_tokens for one in messages)
        self.step_cost.observe(prompt_tokens, seconds)
        if prompt_tokens >= _PREFILL_STEP_TOKENS and 2 * prompt_tokens >= num_tokens:
            self.rates.observe_prefill(num_tokens, seconds)
            largest = max(messages, key=lambda one: one.num_prompt_tokens)
            self.context_cost.observe(largest.mean_context, seconds / num_tokens)

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
        self.lanes[request.lane].scheduler.finish(request, reason, error, keeps_kv=keeps_kv)
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
        if busy := [tiers for tiers in self._tiers if tiers.is_busy]:
            busy[0].wait(_IDLE_WAIT_S if len(busy) == 1 else _SHARED_WAIT_S)
            return
        lane = next(lane for lane in self.lanes if lane.scheduler.has_requests)
        assert not lane.scheduler.running, "running requests wait for nothing"
        request, tables = lane.scheduler.waiting[0], lane.kv.tables
        blocks = tables.num_blocks_for(request.num_tokens)
        self._finish(
            request,
            FinishReason.ERROR,
            f"{blocks} KV blocks are needed and {tables.num_available} can be had",
        )


def _is_host_bound(params: SamplingParams) -> bool:
    """Whether a request's next token cannot be chosen before the host has seen the last one."""
    return params.has_penalties or params.has_form
