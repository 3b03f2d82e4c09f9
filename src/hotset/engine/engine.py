"""The engine: one step after another, from queued requests to tokens."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from hotset.config import EngineConfig
from hotset.cost.rates import Rates
from hotset.engine.budget import Budget
from hotset.engine.outputs import OutputProcessor
from hotset.engine.scheduler import Scheduler
from hotset.engine.split_mover import SplitMover
from hotset.engine.step_cost import StepCost
from hotset.engine.step_timer import StepTimer
from hotset.errors import ExpertReadError, RequestError
from hotset.executor.prompt_logprobs import PendingPromptLogprobs
from hotset.executor.runner import ModelRunner
from hotset.executor.sampler import PendingTokens, Sampler
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.recorder import RoutingRecorder
from hotset.memory.transfer import TierStack
from hotset.request import FinishReason, RequestOutput, SamplingParams
from hotset.sequence import UNKNOWN_TOKEN, Request, Step

_log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.05
# Fetches that are submitted beside a step take at most this part of the time of one: the next
# step's inputs are copied behind them, by the same engine of the device.
_LINK_SHARE = 0.8
_RECENT_STEPS = 4
# A step of mostly prefill, and at least so many tokens of it, tells the prefill rate.
_PREFILL_STEP_TOKENS = 32


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine runs with, all of it ready. Made by `engine.build`.

    Attributes:
        config: with the sizes that were found.
        report: what went where, to be told at start.
        device: of the model.
        experts: None where all stay on the device as they were loaded.
        tiers: below the device's KV; None where there are none.
        mover: None where the split between experts and KV stays.
    """

    config: EngineConfig
    budget: Budget
    report: str
    device: torch.device
    runner: ModelRunner
    sampler: Sampler
    outputs: OutputProcessor
    scheduler: Scheduler
    rates: Rates
    step_cost: StepCost
    experts: ExpertBuffer | None
    tiers: TierStack | None
    mover: SplitMover | None


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    """A step that was submitted to the device.

    Attributes:
        requests: those whose next token it chooses, in the order of its tokens.
        tokens: None where `requests` is empty.
        prompt_logprobs: None where the step brings none.
    """

    plan: Step
    requests: list[Request]
    tokens: PendingTokens | None
    prompt_logprobs: PendingPromptLogprobs | None
    timer: StepTimer


class Engine:
    """Runs requests over one model and its KV tiers. Not thread-safe: see `service`.

    On a GPU steps overlap: while one runs, the host takes in the tokens of the one before and
    prepares the next, whose unknown tokens the device reads where it writes them. A request that
    turns out to have ended has then computed one token too many, which is dropped.

    Args:
        parts: what it runs with; it closes them.
        overlap: whether steps overlap; None is on a GPU only.
        owns_model: whether nobody else uses the model, so that its experts on disk go with the
            engine.

    Attributes:
        num_queued: requests that wait for this engine elsewhere; set by whoever has them.
    """

    def __init__(
        self, parts: EngineParts, *, overlap: bool | None = None, owns_model: bool = False
    ) -> None:
        self.config, self.budget, self.report = parts.config, parts.budget, parts.report
        self.max_model_len = parts.budget.max_model_len
        self.scheduler, self.rates = parts.scheduler, parts.rates
        self.kv = parts.scheduler.kv
        self.metrics = self.kv.metrics
        self._device = parts.device
        self._runner, self._sampler, self._outputs = parts.runner, parts.sampler, parts.outputs
        self._step_cost = parts.step_cost
        self._tiers, self._experts, self._mover = parts.tiers, parts.experts, parts.mover
        self._overlap = parts.device.type == "cuda" if overlap is None else overlap
        self._owns_model = owns_model
        self._in_flight: _StepInFlight | None = None
        self._recent_step_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._num_host_bound = 0
        self.num_queued = 0
        self._requests: dict[str, list[Request]] = {}  # those of `n` that have not ended
        self._ids = itertools.count()
        self._warm_up_start_s = time.perf_counter()

    @property
    def is_warming(self) -> bool:
        """Whether steps will get faster by `warm_up`."""
        return self._runner.is_warming

    def warm_up(self) -> tuple[bool, str | None]:
        """Do the next piece of what a start left out; to be called between two steps.

        Returns:
            Whether anything was done, which it is not while kernels are still being compiled; and
            at the end of all a line to be told.

        Raises:
            ModelError: the layers cannot be compiled on this machine.
        """
        with nullcontext() if self._experts is None else self._experts.while_recording():
            did = self._runner.warm_up()
        if self.is_warming:
            return did, None
        seconds = time.perf_counter() - self._warm_up_start_s
        return did, f"warm: all kernels built and steps recorded, {seconds:.1f} s after the start"

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: requests, or outputs nobody has taken."""
        return self.scheduler.has_requests or self._outputs.has_outputs

    @property
    def has_transfers(self) -> bool:
        """Whether copies between tiers are under way; `step` takes note of their end."""
        return self._tiers is not None and self._tiers.is_busy

    @property
    def tiers(self) -> TierStack | None:
        """The tiers below the device, for the status page to look at."""
        return self._tiers

    @property
    def experts(self) -> ExpertBuffer | None:
        """The experts that are in host memory; None where all are on the device."""
        return self._experts

    def validate(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Check a request without queueing it. May be called from any thread.

        Raises:
            RequestError: the request can never be served.
        """
        if not token_ids:
            raise RequestError("the prompt is empty; expected at least one token", param="prompt")
        vocab_size = self._sampler.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise RequestError(f"a prompt token id is not in [0, {vocab_size})", param="prompt")
        if len(token_ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; the longest context is "
                f"{self.max_model_len} with at least one left to generate",
                param="prompt",
                code="context_length_exceeded",
            )
        self._sampler.validate(params)

    def add_request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        *,
        salt: bytes = b"",
        priority: int = 0,
        tenant: str = "",
        request_id: str | None = None,
    ) -> str:
        """Queue a prompt; its outputs carry the returned id.

        Requests with another `salt` cannot find each other's blocks. Those of one `tenant` share
        what each tenant gets of the steps.

        Raises:
            RequestError: the request can never be served; nothing was queued.
        """
        self.validate(token_ids, params)
        request_id = request_id or f"request-{next(self._ids)}"
        if "#" in request_id or request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use or has a '#' in it")
        max_total = self.max_model_len
        if params.max_tokens is not None:
            # Where none is wanted, one is chosen nevertheless, as part of the prompt's last step.
            max_total = min(max_total, len(token_ids) + max(1, params.max_tokens))
        now_s = time.monotonic()
        requests = [
            Request(
                request_id=request_id,
                prompt_len=len(token_ids),
                token_ids=list(token_ids),
                params=params,
                max_total_tokens=max_total,
                index=i,
                salt=salt,
                priority=priority,
                num_scored_tokens=None if params.prompt_logprobs is None or i else 0,
                tenant=tenant,
                arrival_s=now_s,
            )
            for i in range(params.n)
        ]
        self._requests[request_id] = list(requests)
        for request in requests:
            self._num_host_bound += _is_host_bound(params)
            self._outputs.add(request)
        self.metrics.prompt_tokens += len(token_ids)
        self.scheduler.add(requests)
        return request_id

    def abort(self, request_id: str) -> None:
        """End a request (all its `n` outputs); its blocks are free when this returns."""
        for request in list(self._requests.get(request_id, ())):
            self._finish(request, FinishReason.ABORT)

    def step(self) -> list[RequestOutput]:
        """Run one model step and return the outputs it produced, streamed or final.

        Where steps overlap, these are the outputs of the step before.
        """
        if self._num_host_bound:
            self._collect()  # the next step needs its tokens on the host
        self.kv.poll()
        if self._mover is not None:
            self._mover.step(num_queued=self.num_queued)
        plan = self.scheduler.schedule()  # which requests, how many tokens each
        submitted = self._submit_with_copies(plan)
        if self._in_flight is None and not plan.items and self.scheduler.has_requests:
            self._wait_for_tiers()
        self._collect()  # the tokens of the step before, while this one runs
        if submitted is not None:
            self._commit(submitted)
            if not self._overlap:
                self._collect()
        outputs = self._outputs.take()
        if not self.has_work:
            self.count_experts()
        return outputs

    def count_experts(self) -> None:
        """Bring the metrics of experts up to date; waits for the device."""
        if self._experts is not None:
            counts = self._experts.counts()
            self.metrics.expert_hits = counts.hits
            self.metrics.expert_misses = counts.misses
            self.metrics.expert_bytes = counts.moved_bytes
            self.metrics.expert_cpu_computed = counts.computed
            if counts.disk is not None:
                self.metrics.expert_disk_reads = counts.disk.reads
                self.metrics.expert_disk_bytes = counts.disk.read_bytes
                self.metrics.expert_disk_wait_s = counts.disk.wait_s
            self.metrics.expert_predicted = counts.predicted
            self.metrics.expert_predicted_right = counts.predicted_right
            self.metrics.expert_copied_ahead = counts.copied_ahead

    def record_routing(self, recorder: RoutingRecorder | None) -> None:
        """Tell `recorder`, which was there before this engine, of each step from now on."""
        self._runner.recorder = recorder

    def close(self) -> None:
        """End the transfers and close the tiers."""
        if self._experts is not None:
            self._experts.close(with_disk=self._owns_model)
        if self._tiers is not None:
            self._tiers.close()

    def _submit_with_copies(self, plan: Step) -> _StepInFlight | None:
        """Start a step, and the spills and fetches asked for so far beside it."""
        tiers = self._tiers
        if tiers is None:
            return self._submit(plan) if plan.items else None
        if not self._overlap or not plan.items:
            tiers.flush()
            return self._submit(plan) if plan.items else None
        # Copies to the device run one after another, whatever their stream: those of this step's
        # inputs go first, and the others end before the next step's come.
        submitted = self._submit(plan, when_ready=tiers.mark)
        most_s = _LINK_SHARE * min(self._recent_step_s, default=0.0)
        tiers.flush(after_mark=submitted is not None, most_s=most_s)
        return submitted

    def _submit(
        self, plan: Step, when_ready: Callable[[], None] = lambda: None
    ) -> _StepInFlight | None:
        """Start a step on the device; None where it failed. See `ModelRunner.forward`."""
        previous = self._in_flight.tokens if self._in_flight is not None else None
        timer = StepTimer(self._device)
        try:
            logits = self._runner.forward(
                plan, None if previous is None else previous.token_ids, when_ready
            )  # [R + P, vocab]
            requests = [item.request for item in plan.items if item.samples]
            num_rows = len(requests)
            tokens = self._sampler.submit(logits[:num_rows], requests) if requests else None
            scored = None
            if len(logits) > num_rows:
                scored = PendingPromptLogprobs(plan.items, logits[num_rows:])
        except ExpertReadError as error:
            # Whoever it is that needed the expert: nobody can say before the step has run.
            _log.error("a step of %d requests failed: %s", len(plan.items), error)
            assert self._experts is not None
            self.metrics.faults.update(self._experts.take_faults())
            for item in plan.items:
                self._finish(item.request, FinishReason.ERROR, str(error))
            return None
        except (RuntimeError, MemoryError) as error:
            # Out of memory, most likely. The youngest request of the step pays; the others'
            # tokens are computed again in the next step, into the same slots.
            victim = plan.items[-1].request
            _log.exception("a step of %d requests failed", len(plan.items))
            self.metrics.faults["step_failed"] += 1
            self._finish(victim, FinishReason.ERROR, f"the model step failed: {error}")
            return None
        timer.stop()
        return _StepInFlight(plan, requests, tokens, scored, timer)

    def _commit(self, step: _StepInFlight) -> None:
        """Take the step's KV as written: what reads it is submitted later."""
        self.scheduler.commit(step.plan)
        for row, request in enumerate(step.requests):
            if not request.is_finished:
                request.token_ids.append(UNKNOWN_TOKEN)
                request.pending_row = row
        self._in_flight = step

    def _collect(self) -> None:
        """Wait for the tokens of the step in flight, if there is one, and hand them out."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return
        if step.prompt_logprobs is not None:
            for request, entries in step.prompt_logprobs.wait():
                self._outputs.score(request, entries)
        if step.tokens is not None:
            sampled = step.tokens.wait()
            for request, token_id, logprob in zip(
                step.requests, sampled.token_ids, sampled.logprobs, strict=True
            ):
                if request.is_finished:
                    continue
                request.token_ids[-1] = token_id
                request.pending_row = None
                self.metrics.output_tokens += request.params.max_tokens != 0
                reason = self._outputs.append(request, token_id, logprob)
                if request.sequence_id in sampled.errors:
                    self._finish(request, FinishReason.ERROR, sampled.errors[request.sequence_id])
                elif reason is not None:
                    self._finish(request, reason)
        self._observe(step.plan, step.timer.seconds())

    def _observe(self, plan: Step, seconds: float) -> None:
        num_tokens = sum(item.num_tokens for item in plan.items)
        self.metrics.steps += 1
        self.metrics.step_s += seconds
        self._recent_step_s.append(seconds)
        self.metrics.computed_tokens += num_tokens
        prefill_tokens = sum(item.num_tokens for item in plan.items if item.num_tokens > 1)
        self._step_cost.observe(prefill_tokens, seconds)
        if prefill_tokens >= _PREFILL_STEP_TOKENS and 2 * prefill_tokens >= num_tokens:
            self.rates.observe_prefill(num_tokens, seconds)

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        if request.is_finished:
            return
        self.scheduler.finish(request, reason, error)
        self._sampler.release(request.sequence_id)
        self._outputs.finish(request, reason, error)
        self.metrics.requests_finished[reason.value] += 1
        self._num_host_bound -= _is_host_bound(request.params)
        siblings = self._requests[request.request_id]
        siblings.remove(request)
        if not siblings:
            del self._requests[request.request_id]

    def _wait_for_tiers(self) -> None:
        """Nobody can go on before a transfer has ended; or, a bug of ours, nobody ever can."""
        if self._tiers is not None and self._tiers.is_busy:
            self._tiers.wait(_IDLE_WAIT_S)
            return
        assert not self.scheduler.running, "running requests wait for nothing"
        request = self.scheduler.waiting[0]
        blocks = self.kv.num_blocks_for(request.num_tokens)
        self._finish(
            request,
            FinishReason.ERROR,
            f"{blocks} KV blocks are needed and {self.kv.pool.num_available} can be had",
        )


def _is_host_bound(params: SamplingParams) -> bool:
    """Whether a request's next token cannot be chosen before the host has seen the last one."""
    return params.has_penalties or params.has_form
