"""From options to an engine that runs: load, size, place, compile, measure, open."""

import functools
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs
import torch

from hotset.attention.choice import choose_backend
from hotset.attention.flashinfer.kernels import start_kernels
from hotset.cgroups import available_host_bytes
from hotset.clock import REAL_CLOCK
from hotset.config import EngineConfig
from hotset.cost.prefix import PrefixPolicy
from hotset.cost.rates import Rates
from hotset.cost.tuning import TUNINGS
from hotset.cpu_libraries import bound_kernels, set_threads
from hotset.engine.budget import Budget, make_budget
from hotset.engine.engine import Engine, EngineParts
from hotset.engine.memory_split import Memory, MovingSplit, Sizes, check_options, split_memory
from hotset.engine.mixed_tokens import max_mixed_tokens_of
from hotset.engine.model_shape import kv_note
from hotset.engine.open_tiers import open_tiers
from hotset.engine.outputs import OutputProcessor
from hotset.engine.scheduler import Scheduler
from hotset.engine.split_mover import SplitMover
from hotset.engine.start_times import StartTimes
from hotset.engine.step import Step, StepItem
from hotset.engine.step_cost import StepCost
from hotset.engine.step_input import make_step_input
from hotset.errors import ConfigError
from hotset.executor.local import LocalExecutor
from hotset.executor.probe import inspect_model, weights_bytes, workspace_bytes
from hotset.executor.prompt_logprobs import most_rows
from hotset.executor.runner import ModelRunner
from hotset.executor.sampler import Sampler
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.disk import ExpertSink
from hotset.experts.gating import pack_experts
from hotset.experts.hosting import buffer_experts
from hotset.grammar.json_bounds import JsonBounds
from hotset.kernels.device import likely_hardware
from hotset.kv.cache import KVCache
from hotset.kv.pool import BlockPool
from hotset.linear.packed import pack_linears
from hotset.memory.arena import DeviceArena
from hotset.metrics import Metrics
from hotset.model.devices import resolve_kv_dtype
from hotset.model.loaded import LoadedModel
from hotset.model.loader import load_model
from hotset.request import SamplingParams
from hotset.sequence import Request

_NUM_PHASES = 8  # at most, of a start
_LAYOUT_VERSION = "1"
# Prompts whose time is taken at start.
_TRIAL_TOKENS = (32, 256)


def load_engine(config: EngineConfig) -> tuple[Engine, LoadedModel]:
    """Load the model and set up the engine, most of its steps not yet recorded.

    Raises what either raises.
    """
    set_threads(config.threads)
    times = StartTimes.of_process(num_phases=_NUM_PHASES)
    try:
        with times.phase("load the model") as phase:
            loaded = load_model(
                config.model,
                device=config.device,
                dtype=config.dtype,
                experts_on_host=config.buffers_experts or config.splits_memory,
                experts=ExpertSink(config),
                check=functools.partial(check_options, config),
                needs_tokenizer=True,  # texts go in or out of all that use this
            )
        num_bytes = weights_bytes(loaded.model)
        phase.detail = f"{num_bytes / 1e9:.1f} GB, {num_bytes / 1e9 / phase.seconds:.1f} GB/s"
        engine = build_engine(config, loaded, owns_model=True, defers_recording=True, times=times)
    finally:
        times.close()
    engine.report += f"\n{times.report()}"
    if engine.is_warming:
        engine.report += "\n  serving while more steps are recorded, slower until then"
    return engine, loaded


def build_engine(
    config: EngineConfig,
    loaded: LoadedModel,
    *,
    overlap: bool | None = None,
    owns_model: bool = False,
    defers_recording: bool = False,
    times: StartTimes | None = None,
) -> Engine:
    """Set up an engine over a loaded model.

    Args:
        config: sizes and options.
        loaded: the model.
        overlap: whether steps overlap; None is on a GPU only.
        owns_model: whether the engine alone uses the model, so that its experts on disk go with the
            engine.
        defers_recording: whether to be ready before all steps are recorded, and all kernels built:
            `Engine.warm_up` does the rest.
        times: what this takes is added to it.

    Raises:
        ConfigError: sizes that cannot work; `ModelError`: a model that cannot run;
            `TierError`: a disk tier that cannot be opened. Nothing is left behind.
    """
    build = _Build(config, loaded, defers_recording, times or StartTimes())
    with ExitStack() as undo:
        sized = build.size()
        placed = build.place(sized, undo, owns_model=owns_model)
        runner = build.compile(placed)
        measured = build.measure(placed, runner)
        executor = LocalExecutor(runner, measured.sampler, placed.experts, owns_model=owns_model)
        parts = build.open(placed, executor, measured, undo)
        undo.pop_all()
    return Engine(parts if overlap is None else replace(parts, overlaps=overlap))


@dataclass(frozen=True, slots=True)
class _Sized:
    """The sizes that do not wait for experts to be placed."""

    sizes: Sizes
    step_bytes: int


@dataclass(frozen=True, slots=True)
class _Placed:
    """Weights, experts and KV, where they stay.

    Attributes:
        scratch_block: a block of `arena` that no request gets, for rows of padding.
    """

    moving: MovingSplit | None
    experts: ExpertBuffer | None
    budget: Budget
    arena: DeviceArena
    pool: BlockPool
    scratch_block: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was found out by running steps."""

    sampler: Sampler
    step_cost: StepCost
    rates: Rates
    notes: tuple[str, ...]


class _Build:
    """The phases of a set-up. Each returns what it made, and `undo` takes back what it leaves."""

    def __init__(
        self, config: EngineConfig, loaded: LoadedModel, defers: bool, times: StartTimes
    ) -> None:
        bound_kernels()
        self._threads = set_threads(config.threads)
        self._config, self._loaded = config, loaded
        self._model, self._device = loaded.model, loaded.model.device
        self._defers, self._times = defers, times
        with times.phase("look at the layers"):
            kv_dtype = resolve_kv_dtype(config.kv_dtype, self._device)
            self._layout = inspect_model(self._model, kv_dtype)
        self._kernels = start_kernels(self._layout.layers, self._layout.kv_dtype, self._device)

    def size(self) -> _Sized:
        """What KV and experts get of the device's memory."""
        config, model = self._config, self._model
        step_bytes = workspace_bytes(
            model,
            self._layout,
            max_tokens=config.max_num_batched_tokens,
            max_seqs=config.max_num_seqs,
        )
        sizes = split_memory(
            config,
            self._loaded,
            self._layout,
            Memory(_free_device_bytes(self._device), step_bytes),
            max_step_tokens=max_mixed_tokens_of(config, model, is_buffered=True),
        )
        return _Sized(sizes, step_bytes)

    def place(self, sized: _Sized, undo: ExitStack, *, owns_model: bool) -> _Placed:
        """Experts, packed weights and memory for KV.

        Comes before anything else runs the model: its experts may still be where they were loaded.
        """
        config, layout, times, sizes = self._config, self._layout, self._times, sized.sizes
        region = None if sizes.moving is None else sizes.moving.region
        with times.phase("place experts"):
            experts, report = buffer_experts(self._model, config, region, sizes.expert_slots)
        if experts is not None:
            undo.callback(experts.close, with_disk=owns_model)
        with times.phase("pack weights"):
            pack_linears(self._model)
            pack_experts(self._model)
        budget = self._budget(sized, experts)
        num_blocks, first_block = budget.device_blocks, 0
        if region is not None:
            num_blocks = region.num_blocks
            first_block = region.first_block(sizes.expert_slots or 0)
            longest = region.num_kv_blocks(region.most_slots) * config.block_size
            budget = replace(
                budget,
                device_blocks=num_blocks - first_block,
                max_model_len=min(budget.max_model_len, longest),
            )
        with times.phase("take KV memory"):
            arena = DeviceArena(
                layout.cache_specs,
                num_blocks=num_blocks + 1,  # with the scratch block
                block_size=config.block_size,
                dtype=layout.kv_dtype,
                device=self._device,
                scales=self._kv_scales,
                memory=None if experts is None else experts.memory,
            )
        return _Placed(
            sizes.moving,
            experts,
            budget,
            arena,
            BlockPool(num_blocks, first_block),
            num_blocks,
            (sizes.report, report),
        )

    @property
    def _kv_scales(self) -> tuple[tuple[float, float], ...] | None:
        is_rounded = self._layout.kv_dtype != self._layout.dtype
        return self._loaded.kv_scales if is_rounded else None

    def _budget(self, sized: _Sized, experts: ExpertBuffer | None) -> Budget:
        sizes, free_bytes = sized.sizes, _free_device_bytes(self._device)
        if experts is not None and experts.memory is not None:
            free_bytes += sizes.hot_bytes or 0  # taken already: experts and KV share it
        return make_budget(
            self._config,
            device=self._device.type,
            weights_bytes=weights_bytes(self._model),
            expert_bytes=experts.device_bytes if experts is not None else 0,
            workspace_bytes=sized.step_bytes,
            kv_bytes_per_token=self._layout.bytes_per_token,
            model_max_len=self._loaded.max_model_len,
            free_device_bytes=free_bytes,
            hot_bytes=sizes.hot_bytes,
            expert_slots=sizes.expert_slots if experts is None else experts.num_slots,
        )

    def compile(self, placed: _Placed) -> ModelRunner:
        """The model with its attention; on a GPU compiled, and the first steps recorded."""
        config, experts, times = self._config, placed.experts, self._times
        backend = choose_backend(
            placed.arena, self._layout.layers, kernels=self._kernels, waits=False
        )
        runner = ModelRunner(self._model, placed.arena, backend, max_num_seqs=config.max_num_seqs)
        compiles = self._device.type == "cuda" and not config.eager
        if compiles:
            with times.phase("compile the layers"):
                runner.compile(scratch_block=placed.scratch_block)
        with times.phase("attention kernels"):
            runner.load_kernels(waits=not self._defers)
        if compiles and (experts is None or experts.can_be_recorded):
            with times.phase("record steps"):
                runner.record(
                    max_num_tokens=config.max_num_batched_tokens,
                    max_context_blocks=-(-placed.budget.max_model_len // config.block_size),
                    scratch_block=placed.scratch_block,
                    before_cut=experts.join if experts is not None else None,
                    defers=self._defers,
                )
        return runner

    def measure(self, placed: _Placed, runner: ModelRunner) -> _Measured:
        """How long steps take here, and where the CPU is to compute experts."""
        config, loaded, notes = self._config, self._loaded, []
        sampler = Sampler(
            self._model.config.get_text_config().vocab_size,
            device=self._device,
            seed=config.seed,
            tokenizer=loaded.tokenizer,
            eos_token_ids=loaded.eos_token_ids,
            bounds=JsonBounds.of(config),
        )
        with self._times.phase("try steps"):
            sampler.load_kernels(self._layout.dtype)
            trials = _time_prompts(config, placed, runner)
        num_tokens, seconds = trials[-1]
        rates = Rates.of_hardware(likely_hardware(self._device))
        rates.prefill_tokens_per_s = num_tokens / seconds
        experts = placed.experts
        if experts is not None and config.expert_cpu != "off" and self._device.type == "cuda":
            notes.append(experts.compute_cold_on_cpu(config.expert_cpu, threads=config.threads))
            runner.launches = experts.launches
        return _Measured(sampler, StepCost(trials), rates, tuple(notes))

    def open(
        self, placed: _Placed, executor: LocalExecutor, measured: _Measured, undo: ExitStack
    ) -> EngineParts:
        """Tiers, scheduler, and what is told at start."""
        config, experts, metrics = self._config, placed.experts, Metrics()
        disk_path = config.disk_path or Path(platformdirs.user_cache_dir("hotset")) / "kv"
        fingerprint = self._fingerprint(config)
        with self._times.phase("open tiers"):
            tiers = open_tiers(
                config,
                placed.budget,
                placed.arena,
                measured.rates,
                metrics,
                disk_path,
                fingerprint,
                undo,
            )
        policy = PrefixPolicy(
            measured.rates,
            bytes_per_token=self._layout.bytes_per_token,
            mode=config.fetch_policy,
        )
        kv = KVCache(
            placed.pool,
            block_size=config.block_size,
            fingerprint=repr(fingerprint),
            metrics=metrics,
            tiers=tiers,
            policy=policy if tiers is not None else None,
            prefix_caching=config.prefix_caching,
        )
        scheduler = self._scheduler(placed, kv, measured)
        mover = None
        if placed.moving is not None:
            assert experts is not None
            mover = SplitMover(placed.moving, experts, placed.arena, scheduler)
        if experts is not None:
            experts.reset_counts()  # those of the trials above
            metrics.expert_rounding_error = experts.rounding_error
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what trials took and is not kept is others' to have
        return EngineParts(
            config=config,
            budget=placed.budget,
            report=self._report(placed, measured, disk_path),
            overlaps=self._device.type == "cuda",
            executor=executor,
            outputs=OutputProcessor(self._loaded.tokenizer, self._loaded.eos_token_ids),
            scheduler=scheduler,
            rates=measured.rates,
            step_cost=measured.step_cost,
            experts=experts,
            tiers=tiers,
            mover=mover,
            clock=REAL_CLOCK,
        )

    def _scheduler(self, placed: _Placed, kv: KVCache, measured: _Measured) -> Scheduler:
        config, device = self._config, self._device.type
        is_buffered = placed.experts is not None
        return Scheduler(
            kv,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_mixed_tokens=max_mixed_tokens_of(config, self._model, is_buffered=is_buffered),
            max_scored_tokens=most_rows(
                measured.sampler.vocab_size, self._layout.dtype.itemsize, device
            ),
            # On a CPU more rows are no faster, and a step of many takes seconds.
            bursts=device == "cuda",
            row_tile=TUNINGS[device].row_tile,
            rotation_s=config.rotation_s,
            step_cost=measured.step_cost,
        )

    def _fingerprint(self, config: EngineConfig) -> dict[str, str]:
        """What stored blocks depend on: another value of any of these is another chain of keys."""
        layout, cold = self._layout, config.expert_cold_dtype
        rounded = "" if cold == "auto" else f" experts {cold}"
        return {
            "layout": _LAYOUT_VERSION,
            "weights": f"{self._loaded.fingerprint}{rounded}",
            "dtype": str(layout.dtype),
            "kv_dtype": f"{layout.kv_dtype} {self._kv_scales}",
            "block_size": str(config.block_size),
            "shape": str(layout.cache_specs),
        }

    def _report(self, placed: _Placed, measured: _Measured, disk_path: Path) -> str:
        lines = [placed.budget.report(device=self._device.type, disk_path=disk_path)]
        if self._device.type == "cpu":
            lines.append(f"threads that compute: {self._threads}")
        lines += [kv_note(self._model, self._layout), *placed.notes, *measured.notes]
        return "\n".join(line for line in [*lines, *self._loaded.notes] if line)


def _time_prompts(
    config: EngineConfig, placed: _Placed, runner: ModelRunner
) -> list[tuple[int, float]]:
    """Tokens and seconds of steps of one prompt: a short one and one of a usual size.

    Their KV goes to the first blocks, which no request has yet.
    """
    trials = []
    for most_tokens in _TRIAL_TOKENS:
        longest = placed.budget.max_model_len
        num_tokens = min(most_tokens, config.max_num_batched_tokens, longest)
        request = Request("rate", num_tokens, [0] * num_tokens, SamplingParams(), num_tokens)
        first = placed.pool.first
        request.kv.block_table = list(range(first, first - (-num_tokens // config.block_size)))
        step = make_step_input(Step([StepItem.of(request, 0, num_tokens)]), config.block_size)
        runner.forward(step).sum().item()  # the first run also allocates
        start_s = time.perf_counter()
        runner.forward(step).sum().item()  # waits for the device
        trials.append((num_tokens, time.perf_counter() - start_s))
    return trials


def _free_device_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return available_host_bytes()
    if device.type == "cuda":
        free_bytes: int = torch.cuda.mem_get_info(device)[0]
        return free_bytes
    raise ConfigError(f"device {device.type!r} is not supported; expected cpu or cuda")
