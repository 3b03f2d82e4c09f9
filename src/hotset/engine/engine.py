"""The engine: one step after another, from queued requests to tokens."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs
import torch
from transformers import PreTrainedModel

from hotset.attention.flashinfer.kernels import start_kernels
from hotset.cgroups import available_host_bytes
from hotset.config import GIB, EngineConfig
from hotset.cost.config_sizes import largest
from hotset.cost.prefix import PrefixPolicy, Rates
from hotset.cpu_libraries import bound_kernels, set_threads
from hotset.engine.budget import make_budget
from hotset.engine.memory_split import Memory, split_memory
from hotset.engine.model_shape import kv_note
from hotset.engine.outputs import OutputProcessor
from hotset.engine.scheduler import Scheduler
from hotset.engine.split_mover import SplitMover
from hotset.engine.start_times import StartTimes
from hotset.engine.step_cost import StepCost
from hotset.engine.step_timer import StepTimer
from hotset.errors import ConfigError, ExpertReadError, RequestError
from hotset.executor.probe import inspect_model, weights_bytes, workspace_bytes
from hotset.executor.prompt_logprobs import PendingPromptLogprobs, most_rows
from hotset.executor.runner import ModelRunner, choose_backend
from hotset.executor.sampler import PendingTokens, Sampler
from hotset.experts.buffer import ExpertBuffer, buffer_experts
from hotset.experts.gating import experts_layers, pack_experts
from hotset.experts.recorder import RoutingRecorder
from hotset.grammar.json_bounds import JsonBounds
from hotset.kv.cache import KVCache
from hotset.kv.pool import BlockPool
from hotset.linear.packed import pack_linears
from hotset.memory.arena import DeviceArena, HostArena
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import DiskTier
from hotset.memory.host_tier import HostTier
from hotset.memory.transfer import TierStack, make_copier
from hotset.metrics import Metrics
from hotset.model.loaded import LoadedModel
from hotset.model.loader import resolve_kv_dtype
from hotset.request import (
    UNKNOWN_TOKEN,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    StepItem,
    StepPlan,
    output_id,
)

_log = logging.getLogger(__name__)

_LAYOUT_VERSION = "1"
_IDLE_WAIT_S = 0.05
# Fetches that are submitted beside a step take at most this part of the time of one: the next
# step's inputs are copied behind them, by the same engine of the device.
_LINK_SHARE = 0.8
_RECENT_STEPS = 4
# A step of mostly prefill, and at least so many tokens of it, tells the prefill rate.
_PREFILL_STEP_TOKENS = 32
# Prompts whose time is taken at start.
_TRIAL_TOKENS = (32, 256)
# `max_mixed_tokens` by device. An H200 reaches 650 TFLOP/s from about 1024 rows on, and half of
# it with 512, where a product of 4096 columns is 64 tiles for 132 processors.
_MIXED_TOKENS = {"cuda": 1024, "cpu": 256}
# Experts get near that rate from so many rows each.
_MIXED_ROWS_PER_EXPERT = 512
# `Scheduler.row_tile` by device. On an H200 the products of a step of 257 to 384 tokens of an 8B
# model take 9.8 ms, where 256 take 6.9.
_ROW_TILE = {"cuda": 256, "cpu": 1}


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    """A step that was submitted to the device.

    Attributes:
        requests: those whose next token it chooses, in the order of its tokens.
        tokens: None where `requests` is empty.
        prompt_logprobs: None where the step brings none.
    """

    plan: StepPlan
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
        config: sizes and options.
        loaded: the model.
        overlap: whether steps overlap; None is on a GPU only.
        owns_model: whether nobody else uses the model, so that its experts on disk go with the
            engine.
        defers_recording: whether to be ready before all steps are recorded, and all kernels built:
            `warm_up` does the rest.
        times: what this takes is added to it.

    Attributes:
        num_queued: requests that wait for this engine elsewhere; set by whoever has them.

    Raises:
        ConfigError: sizes that cannot work; `ModelError`: a model that cannot run;
            `TierError`: a disk tier that cannot be opened. Nothing is left behind.
    """

    def __init__(
        self,
        config: EngineConfig,
        loaded: LoadedModel,
        *,
        overlap: bool | None = None,
        owns_model: bool = False,
        defers_recording: bool = False,
        times: StartTimes | None = None,
    ) -> None:
        self.metrics = Metrics()
        model = loaded.model
        self._device = model.device
        self._overlap = model.device.type == "cuda" if overlap is None else overlap
        self._in_flight: _StepInFlight | None = None
        self._recent_step_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._num_host_bound = 0
        self._owns_model = owns_model
        self._defers_recording = defers_recording
        self._tiers: TierStack | None = None
        self._experts: ExpertBuffer | None = None
        self._mover: SplitMover | None = None
        self.num_queued = 0
        try:
            self._set_up(config, loaded, times or StartTimes())
        except BaseException:
            self.close()
            raise

    def _set_up(self, config: EngineConfig, loaded: LoadedModel, times: StartTimes) -> None:
        """All that runs the model or takes memory beside it."""
        bound_kernels()
        threads = set_threads(config.threads)
        model = loaded.model
        with times.phase("look at the layers"):
            layout = inspect_model(model, resolve_kv_dtype(config.kv_dtype, model.device))
        kernels = start_kernels(layout.layers, layout.kv_dtype, model.device)
        step_bytes = workspace_bytes(
            model,
            layout,
            max_tokens=config.max_num_batched_tokens,
            max_seqs=config.max_num_seqs,
        )
        memory = Memory(_free_device_bytes(model.device), step_bytes)
        config, split_report, moving = split_memory(
            config,
            loaded,
            layout,
            memory,
            max_step_tokens=_max_mixed_tokens(config, model, is_buffered=True),
        )
        self.config = config
        # Before anything else runs the model: its experts may still be where they were loaded.
        region = None if moving is None else moving.region
        with times.phase("place experts"):
            self._experts, experts_report = buffer_experts(model, config, region)
        shared = None if self._experts is None else self._experts.memory
        shared_kv_bytes = 0 if shared is None else int((config.hot_gib or 0.0) * GIB)
        kv_scales = loaded.kv_scales if layout.kv_dtype != layout.dtype else None
        with times.phase("pack weights"):
            pack_linears(model)
            pack_experts(model)
        self.budget = make_budget(
            config,
            device=model.device.type,
            weights_bytes=weights_bytes(model),
            expert_bytes=self._experts.device_bytes if self._experts is not None else 0,
            workspace_bytes=step_bytes,
            kv_bytes_per_token=layout.bytes_per_token,
            model_max_len=loaded.max_model_len,
            free_device_bytes=_free_device_bytes(model.device) + shared_kv_bytes,
        )
        num_blocks, first_block = self.budget.device_blocks, 0
        if region is not None:
            num_blocks = region.num_blocks
            first_block = region.first_block(config.expert_slots or 0)
            longest = region.num_kv_blocks(region.most_slots) * config.block_size
            self.budget = replace(
                self.budget,
                device_blocks=num_blocks - first_block,
                max_model_len=min(self.budget.max_model_len, longest),
            )
        pool = BlockPool(num_blocks, first_block)
        self.max_model_len = self.budget.max_model_len
        with times.phase("take KV memory"):
            arena = DeviceArena(
                layout.kv_shapes,
                num_blocks=num_blocks + 1,  # the last one is for rows of padding
                block_size=config.block_size,
                dtype=layout.kv_dtype,
                device=model.device,
                scales=kv_scales,
                memory=shared,
            )
        # What a stored block depends on: another value of any of these is another chain of keys.
        cold = config.expert_cold_dtype
        rounded = "" if cold == "auto" else f" experts {cold}"
        fingerprint = {
            "layout": _LAYOUT_VERSION,
            "weights": f"{loaded.fingerprint}{rounded}",
            "dtype": str(layout.dtype),
            "kv_dtype": f"{layout.kv_dtype} {kv_scales}",
            "block_size": str(config.block_size),
            "shape": str(layout.kv_shapes),
        }
        disk_path = config.disk_path or Path(platformdirs.user_cache_dir("hotset")) / "kv"
        defers = self._defers_recording
        backend = choose_backend(arena, layout, kernels=kernels, waits=False)
        self._runner = ModelRunner(model, arena, backend, max_num_seqs=config.max_num_seqs)
        compiles = model.device.type == "cuda" and not config.eager
        if compiles:
            with times.phase("compile the layers"):
                self._runner.compile(scratch_block=num_blocks)
        with times.phase("attention kernels"):
            self._runner.load_kernels(waits=not defers)
        if compiles and (self._experts is None or self._experts.can_be_recorded):
            with times.phase("record steps"):
                self._runner.record(
                    max_num_tokens=config.max_num_batched_tokens,
                    max_context_blocks=-(-self.max_model_len // config.block_size),
                    scratch_block=num_blocks,
                    before_cut=self._experts.join if self._experts is not None else None,
                    defers=defers,
                )
        self._sampler = Sampler(
            model.config.get_text_config().vocab_size,
            device=model.device,
            seed=config.seed,
            tokenizer=loaded.tokenizer,
            eos_token_ids=loaded.eos_token_ids,
            bounds=JsonBounds.of(config),
        )
        self._outputs = OutputProcessor(loaded.tokenizer, loaded.eos_token_ids)
        with times.phase("try steps"):
            self._sampler.load_kernels(layout.dtype)
            trials = self._time_prompts(pool.first)
        self._step_cost = StepCost(trials)
        num_tokens, seconds = trials[-1]
        self.rates = Rates(prefill_tokens_per_s=num_tokens / seconds, link_bytes_per_s={})
        if self._experts is not None and config.expert_cpu != "off" and model.device.type == "cuda":
            said = self._experts.compute_cold_on_cpu(config.expert_cpu, threads=config.threads)
            experts_report += f"\n{said}"
            self._runner.launches = self._experts.launches
        with times.phase("open tiers"):
            self._tiers = self._open_tiers(arena, disk_path, fingerprint)
        policy = PrefixPolicy(
            self.rates, bytes_per_token=layout.bytes_per_token, mode=config.fetch_policy
        )
        self.kv = KVCache(
            pool,
            block_size=config.block_size,
            fingerprint=repr(fingerprint),
            metrics=self.metrics,
            tiers=self._tiers,
            policy=policy if self._tiers is not None else None,
            prefix_caching=config.prefix_caching,
        )
        self.scheduler = Scheduler(
            self.kv,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_mixed_tokens=_max_mixed_tokens(
                config, model, is_buffered=self._experts is not None
            ),
            max_scored_tokens=most_rows(
                self._sampler.vocab_size, layout.dtype.itemsize, model.device.type
            ),
            # On a CPU more rows are no faster, and a step of many takes seconds.
            bursts=model.device.type == "cuda",
            row_tile=_ROW_TILE[model.device.type],
            rotation_s=config.rotation_s,
            step_cost=self._step_cost,
        )
        if moving is not None:
            assert self._experts is not None
            self._mover = SplitMover(moving, self._experts, arena, self.scheduler)
        self.report = self.budget.report(device=model.device.type, disk_path=disk_path)
        if model.device.type == "cpu":
            self.report += f"\nthreads that compute: {threads}"
        for lines in (kv_note(model, layout), split_report, experts_report, *loaded.notes):
            if lines:
                self.report += f"\n{lines}"
        if self._experts is not None:
            self._experts.reset_counts()  # those of the trials above
            self.metrics.expert_rounding_error = self._experts.rounding_error
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # what trials took and is not kept is others' to have
        self._requests: dict[str, Request] = {}
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
        requests = [
            Request(
                request_id=output_id(request_id, i),
                prompt_len=len(token_ids),
                token_ids=list(token_ids),
                params=params,
                max_total_tokens=max_total,
                salt=salt,
                priority=priority,
                num_scored_tokens=None if params.prompt_logprobs is None or i else 0,
                tenant=tenant,
            )
            for i in range(params.n)
        ]
        for request in requests:
            self._requests[request.request_id] = request
            self._num_host_bound += _is_host_bound(params)
            self._outputs.add(request)
        self.metrics.prompt_tokens += len(token_ids)
        self.scheduler.add(requests)
        return request_id

    def abort(self, request_id: str) -> None:
        """End a request (all its `n` outputs); its blocks are free when this returns."""
        for request in list(self._requests.values()):
            if request.output_index[0] == request_id:
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

    def _submit_with_copies(self, plan: StepPlan) -> _StepInFlight | None:
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
        self, plan: StepPlan, when_ready: Callable[[], None] = lambda: None
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
                if request.request_id in sampled.errors:
                    self._finish(request, FinishReason.ERROR, sampled.errors[request.request_id])
                elif reason is not None:
                    self._finish(request, reason)
        self._observe(step.plan, step.timer.seconds())

    def _observe(self, plan: StepPlan, seconds: float) -> None:
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
        self._sampler.release(request.request_id)
        self._outputs.finish(request.request_id, reason, error)
        self.metrics.requests_finished[reason.value] += 1
        self._num_host_bound -= _is_host_bound(request.params)
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

    def _open_tiers(
        self, arena: DeviceArena, disk_path: Path, fingerprint: dict[str, str]
    ) -> TierStack | None:
        budget, config = self.budget, self.config
        if budget.host_slots == 0:
            return None
        disk = None
        if budget.disk_bytes:
            disk = DiskTier.open(
                disk_path,
                payload_bytes=slot_bytes_for(budget.block_bytes),
                capacity_bytes=budget.disk_bytes,
                fingerprint=fingerprint,
                read_deadline_s=config.disk_read_deadline_s,
                write_queue_s=config.disk_write_queue_s,
            )
        host_arena = HostArena(num_slots=budget.host_slots, block_bytes=budget.block_bytes)
        tiers = TierStack(
            HostTier(0),  # grows as its memory becomes ready
            host_arena,
            make_copier(arena, host_arena),
            block_bytes=budget.block_bytes,
            rates=self.rates,
            metrics=self.metrics,
            below=disk,
        )
        tiers.measure_rates(num_blocks=min(16, budget.device_blocks, tiers.host.num_slots))
        return tiers

    def _time_prompts(self, first_block: int) -> list[tuple[int, float]]:
        """Tokens and seconds of steps of one prompt: a short one and one of a usual size.

        Their KV goes to blocks from `first_block` on.
        """
        trials = []
        for most_tokens in _TRIAL_TOKENS:
            num_tokens = min(most_tokens, self.config.max_num_batched_tokens, self.max_model_len)
            request = Request("rate", num_tokens, [0] * num_tokens, SamplingParams(), num_tokens)
            end = first_block - (-num_tokens // self.config.block_size)
            request.block_table = list(range(first_block, end))
            plan = StepPlan([StepItem(request, 0, num_tokens)])
            self._runner.forward(plan).sum().item()  # the first run also allocates
            start_s = time.perf_counter()
            self._runner.forward(plan).sum().item()  # waits for the device
            trials.append((num_tokens, time.perf_counter() - start_s))
        return trials


def _is_host_bound(params: SamplingParams) -> bool:
    """Whether a request's next token cannot be chosen before the host has seen the last one."""
    return params.has_penalties or params.has_form


def _max_mixed_tokens(config: EngineConfig, model: PreTrainedModel, *, is_buffered: bool) -> int:
    """Most tokens of a step of prompts beside decodes, with some experts in host memory or none."""
    if config.max_mixed_tokens is not None:
        return config.max_mixed_tokens
    tokens, layers = _MIXED_TOKENS[model.device.type], experts_layers(model)
    if model.device.type == "cpu":
        return tokens
    if config.rotation_s is not None:
        # First tokens are to come soon: the fewer steps the prompts take, the fewer decodes beside.
        return config.max_num_batched_tokens
    if not layers:
        return tokens
    if is_buffered:
        # A step with prompts brings nearly all missing experts over the link, which takes longer
        # than to compute any tokens: the more of them share it, the better, decodes too.
        return config.max_num_batched_tokens
    top_k = largest(model.config.get_text_config(), "num_experts_per_tok") or 1
    num_experts: int = layers[0].num_experts
    tokens = max(tokens, _MIXED_ROWS_PER_EXPERT * num_experts // top_k)
    return min(tokens, config.max_num_batched_tokens)


def _free_device_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return available_host_bytes()
    if device.type == "cuda":
        free_bytes: int = torch.cuda.mem_get_info(device)[0]
        return free_bytes
    raise ConfigError(f"device {device.type!r} is not supported; expected cpu or cuda")
