"""Running the arms: a fresh engine for each over the same weights, one after the other."""

import gc
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hotset.bench.driver import drive, settle, wait_for_host_tier
from hotset.bench.expert_arms import (
    EXPERTS,
    RESIDENT,
    expert_sizes,
    make_ready,
    with_all_resident,
)
from hotset.bench.play import Play
from hotset.bench.predict import BufferedExperts, predict
from hotset.bench.profiler import StepProfiler
from hotset.bench.result import ArmRun, columns, observe
from hotset.bench.workload import Spec, Work, filler, make_work, prefix_work, warm_up
from hotset.cgroups import available_host_bytes
from hotset.cost.expert_steps import ExpertCost, link_of
from hotset.cost.loaded import make_cost_model
from hotset.cost.routing import Routing, skewed_shares
from hotset.cost.step_time import CostModel
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.model_shape import kv_note
from hotset.errors import ConfigError, HotsetError, PlanError
from hotset.executor.probe import inspect_model
from hotset.experts.recorder import RoutingRecorder, write_routing
from hotset.experts.sizes import slot_bytes_of
from hotset.kernels.device import known_hardware
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import capacity_bytes_for
from hotset.model.devices import resolve_kv_dtype
from hotset.model.loaded import LoadedModel
from hotset.option_groups import ExpertBudget, ExpertSlots, HostedExperts
from hotset.options import Options
from hotset.units import GIB

ARMS = ("hot", "host", "host+disk", RESIDENT, EXPERTS)

# Where no size is given: contexts over hot tier; host and disk tiers over contexts.
_CONTEXTS_PER_HOT = 4.0
_HOST_PER_CONTEXTS = 1.1
_HOST_BESIDE_DISK = 0.5
_DISK_PER_CONTEXTS = 1.25


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How runs are made.

    Attributes:
        profile_steps: profile so many steps of each run; 0 for none.
        max_s: a run ends after so long, done or not.
        hardware: name of the profile for predictions; None chooses one.
        verify: keep the answers.
        wait_for_tiers: start the run only when all host memory is pinned.
        record_routing: file for what experts the tokens of the first run went to; None for none.
        router_skew: see `router_skew.skew_routers`; None leaves random weights as they are.
    """

    profile_steps: int = 0
    max_s: float | None = None
    hardware: str | None = None
    verify: bool = False
    wait_for_tiers: bool = True
    record_routing: Path | None = None
    router_skew: float | None = None


@dataclass(frozen=True, slots=True)
class Say:
    """Where lines and progress go.

    Attributes:
        line: is told what has happened.
        progress: is called once a step, and calls what it is given if it wants the text now.
    """

    line: Callable[[str], None]
    progress: Callable[[Callable[[], str]], None]


class Bench:
    """The arms of one model and workload."""

    def __init__(
        self,
        spec: Spec,
        config: Options,
        loaded: LoadedModel,
        options: RunOptions,
        say: Say,
    ) -> None:
        self._spec = spec
        self._loaded = loaded
        self._options = options
        self._say = say
        model = loaded.model
        self._vocab_size: int = model.config.get_text_config().vocab_size
        max_context = min(
            config.schedule.max_model_len or loaded.max_model_len, loaded.max_model_len
        )
        self.work = make_work(spec, self._vocab_size, max_context=max_context)
        kv_dtype = resolve_kv_dtype(config.model.kv_dtype, model.device)
        self._layout = inspect_model(model, kv_dtype)
        token_bytes = self._layout.bytes_per_token
        self._block_size = config.memory.block_size or self._layout.default_block_size
        is_tiered = spec.workload != "unshared"  # that one is about what fits
        self._config = config
        if is_tiered and config.memory.hot_gib is None and config.memory.total_gib is None:
            hot_gib = _hot_gib(self._block_size, self.work, token_bytes)
            self._config = _with_hot_tier(config, hot_gib, model)
        self._block_bytes = token_bytes * self._block_size
        self.notes: list[str] = []
        # Before the first engine, which may compile the model with it.
        self._recorder = RoutingRecorder(model) if options.record_routing is not None else None
        self._cost = self._cost_model()

    @property
    def _dtype(self) -> str:
        if self._config.model.dtype == "fp8":
            return "fp8"
        return str(self._loaded.model.dtype).removeprefix("torch.")

    def facts(self) -> dict[str, Any]:
        """The model, for results."""
        model = self._loaded.model
        return {
            "model": self._loaded.name,
            "dtype": self._dtype,
            "kv_dtype": self._config.model.kv_dtype,
            "device": str(model.device),
            "hot_gib": self._config.memory.hot_gib,
        }

    def run(self, arm: str, repeat: int) -> ArmRun:
        """Start an engine for `arm`, warm it up, play the workload, and release its memory.

        Raises:
            HotsetError: the engine cannot be started with these sizes, or broke off.
        """
        say, model = self._say, self._loaded.model
        with ExitStack() as stack:
            make_ready(self._config, model)
            config = self._config_of(arm, stack)
            _release(model.device)
            start_s = time.perf_counter()
            engine = build_engine(config, self._loaded)
            started_s = time.perf_counter() - start_s
            try:
                report = engine.report
                say.line(f"{arm}: started in {started_s:.1f} s\n{report}")
                run = self._measure(engine, arm, repeat)
            finally:
                engine.close()
                del engine
                _release(model.device)
        run.start_s, run.budget_report = started_s, report
        return run

    def _measure(self, engine: Engine, arm: str, repeat: int) -> ArmRun:
        options, say = self._options, self._say
        if self.work.longest_context > engine.max_model_len:
            raise ConfigError(
                f"the workload has contexts of {self.work.longest_context} tokens but the hot tier "
                f"serves {engine.max_model_len}; give more hot_gib"
            )
        sizes = self._sizes(engine)
        tiers_ready_s = wait_for_host_tier(engine) if options.wait_for_tiers else None
        begin_s = time.perf_counter()
        is_small = self._loaded.model.device.type == "cpu"
        length = engine.max_model_len
        drive(engine, warm_up(self._spec, self._vocab_size, length, is_small=is_small))
        warm_up_s = time.perf_counter() - begin_s
        begin_s = time.perf_counter()
        if self.work.prefixes:
            self._send_prefixes(engine)
        prepare_s = time.perf_counter() - begin_s
        profiler = None
        if options.profile_steps:
            profiler = StepProfiler(options.profile_steps, self._loaded.model.device)
        engine.count_experts()
        before = _counters(engine)
        if self._loaded.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        gc.collect()
        gc.freeze()  # as the server does: collections leave model and workload alone
        recorder, self._recorder = self._recorder, None  # of one run
        engine.record_routing(recorder)
        try:
            driven = drive(
                engine,
                self.work,
                max_s=options.max_s,
                progress=lambda play, now_s: say.progress(
                    lambda: _progress(arm, engine, play, now_s)
                ),
                hook=profiler,
            )
        finally:
            gc.unfreeze()
            engine.record_routing(None)
            if profiler is not None:
                profiler.close()
        if recorder is not None:
            self._keep_routing(recorder, arm)
        if profiler is not None:
            say.line(f"{arm}: profile\n{profiler.report}")
        run = observe(arm, repeat, driven.play, driven.wall_s, is_complete=driven.is_complete)
        if not options.verify:
            run.outputs.clear()
        run.tiers_ready_s, run.warm_up_s, run.prepare_s = tiers_ready_s, warm_up_s, prepare_s
        engine.count_experts()
        run.engine = _engine_figures(_difference(before, _counters(engine)))
        run.engine["expert_rounding_error"] = engine.metrics.expert_rounding_error  # no count
        run.sizes = sizes
        run.samples = columns(driven.watch.samples)
        run.peak_host_rss_bytes = driven.watch.peak_host_rss_bytes
        if self._loaded.model.device.type == "cuda":
            run.peak_device_bytes = torch.cuda.max_memory_reserved()
        if profiler is not None:
            run.notes.append("profiled: times are longer than without")
        if not driven.is_complete:
            run.notes.append(f"broken off after {driven.wall_s:.0f} s")
        run.prediction = self._predict(engine, arm, run.engine)
        return run

    def _keep_routing(self, recorder: RoutingRecorder, arm: str) -> None:
        path = self._options.record_routing
        assert path is not None, "recorded for nobody"
        top_k = getattr(self._loaded.model.config.get_text_config(), "num_experts_per_tok", None)
        about = self.facts() | {
            "workload": self.work.title,
            "arm": arm,
            "num_experts": recorder.num_experts,
            "top_k": top_k,
        }
        num_steps = write_routing(path, recorder, about)
        self._say.line(f"{arm}: routing of {num_steps} steps in {path}")
        self.notes.append(f"routing was counted, in {path}: each step took a little longer")

    def _send_prefixes(self, engine: Engine) -> None:
        """Compute the shared prefixes once, then push them out of the device."""
        drive(engine, prefix_work(self.work))
        hot_tokens = engine.sizes.device_blocks * engine.sizes.block_size
        drive(engine, filler(hot_tokens, engine.max_model_len, self._vocab_size))
        settle(engine)

    def _sizes(self, engine: Engine) -> dict[str, Any]:
        sizes, size = engine.sizes, engine.sizes.block_size
        slot = slot_bytes_for(sizes.block_bytes)
        tiers = engine.tiers
        disk = sum(info.capacity_payloads for info in tiers.infos[1:]) if tiers is not None else 0
        known = sum(turn.known_tokens for session in self.work.sessions for turn in session.turns)
        return {
            "hot_tokens": sizes.device_blocks * size,
            "host_tokens": sizes.host_slots * size,
            "disk_tokens": disk * size,
            "hot_bytes": sizes.device_blocks * sizes.block_bytes,
            "host_bytes": sizes.host_slots * slot,
            "disk_bytes": disk * slot,
            "weights_bytes": sizes.weights_bytes + sizes.expert_bytes,
            "kv_bytes_per_token": sizes.block_bytes // size,
            "work_kv_tokens": self.work.kv_tokens,
            "work_known_tokens": known,
            "link_bytes_per_s": dict(engine.rates.link_bytes_per_s),
            "prefill_tokens_per_s": engine.rates.prefill_tokens_per_s,
            "max_model_len": engine.max_model_len,
            **expert_sizes(engine, self._loaded.model),
        }

    def _config_of(self, arm: str, stack: ExitStack) -> Options:
        """The engine's options for an arm; a disk tier starts empty, in a folder of its own."""
        config = self._config
        slot_bytes = slot_bytes_for(self._block_bytes)
        blocks = -(-self.work.kv_tokens // self._block_size)
        if (
            self.work.prefixes and config.memory.hot_gib is not None
        ):  # what pushes them out goes down too
            blocks += 2 * int(config.memory.hot_gib * GIB / self._block_bytes)
        if arm == RESIDENT:
            config = with_all_resident(config, self._loaded.model)
        if arm in ("hot", RESIDENT, EXPERTS):
            return config.but(host_gib=0.0, disk_gib=0.0, disk_path=None)
        host_gib = config.memory.host_gib
        if not host_gib:
            share = _HOST_PER_CONTEXTS if arm == "host" else _HOST_BESIDE_DISK
            most = available_host_bytes() / 2
            host_gib = max(64 * slot_bytes, min(blocks * share * slot_bytes, most)) / GIB
        if arm == "host":
            return config.but(host_gib=host_gib, disk_gib=0.0, disk_path=None)
        disk_gib = config.memory.disk_gib
        if not disk_gib:
            num_payloads = int(blocks * _DISK_PER_CONTEXTS) + 1
            disk_gib = (capacity_bytes_for(num_payloads, slot_bytes) + 1) / GIB
        parent = config.memory.disk_path
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=parent))
        return config.but(host_gib=host_gib, disk_gib=disk_gib, disk_path=Path(folder))

    def _cost_model(self) -> CostModel | None:
        """None, with a note, where nothing can be predicted."""
        model = self._loaded.model
        hardware = known_hardware(model.device, self._options.hardware)
        if hardware is None:
            self.notes.append(
                "no prediction: this machine was not measured; run 'hotset probe', or name "
                "the hardware"
            )
            return None
        try:
            cost = make_cost_model(
                model.config.to_dict(),
                self._loaded.name,
                self._dtype,
                hardware,
                kv_dtype=self._config.model.kv_dtype,
            )
        except PlanError as error:
            self.notes.append(f"no prediction: {error}")
            return None
        if note := kv_note(model, self._layout):
            self.notes.append(f"{note}; predictions count the latter")
        skew = self._options.router_skew
        if skew is not None:
            shape = cost.shape
            cost.routing = Routing(skewed_shares(shape.num_experts, shape.top_k_experts, skew))
        return cost

    def _predict(self, engine: Engine, arm: str, counters: dict[str, Any]) -> dict[str, Any] | None:
        """Expected figures; of experts in host memory also those of the hit rate of the run."""
        if self._cost is None:
            return None
        found = self._expected(engine, arm, hit_rate=None)
        needed = counters["expert_hits"] + counters["expert_misses"]
        if engine.experts is not None and needed:
            hit_rate = counters["expert_hits"] / needed
            measured = self._expected(engine, arm, hit_rate=hit_rate)
            found["at_hit_rate"] = {
                "hit_rate": hit_rate,
                "wall_s": measured["wall_s"],
                "total_tokens_per_s": measured["total_tokens_per_s"],
                "output_tokens_per_s": measured["output_tokens_per_s"],
            }
        return found

    def _expected(self, engine: Engine, arm: str, *, hit_rate: float | None) -> dict[str, Any]:
        cost, sizes, buffer = self._cost, self._sizes(engine), engine.experts
        assert cost is not None
        experts, max_step_tokens = None, self._config.schedule.max_num_batched_tokens
        if buffer is not None:
            max_step_tokens = min(max_step_tokens, engine.scheduler.max_mixed_tokens)
            link = link_of(cost, cold_bytes=buffer.sizes.cold_bytes, hit_rate=hit_rate)
            experts = BufferedExperts(ExpertCost(cost, link, buffer.sizes.plan), buffer.num_slots)
        found = predict(
            cost,
            self.work,
            hot_tokens=sizes["hot_tokens"],
            host_tokens=0 if arm == "hot" else sizes["host_tokens"],
            disk_tokens=sizes["disk_tokens"],
            max_num_seqs=self._config.schedule.max_num_seqs,
            max_batched_tokens=max_step_tokens,
            experts=experts,
        )
        return found.as_dict()


def order_of(arms: Sequence[str], repeat: int) -> list[str]:
    """Arms rotate from one round to the next, so that none is always first."""
    shift = repeat % len(arms)
    return [*arms[shift:], *arms[:shift]]


def parse_arms(text: str) -> list[str]:
    """The arms that a text names.

    Raises:
        ConfigError: there is no such arm, or one is named twice.
    """
    arms = [arm.strip() for arm in text.split(",") if arm.strip()]
    for arm in arms:
        if arm not in ARMS:
            raise ConfigError(
                f"arms is {text!r}; {arm!r} is unknown, expected some of {','.join(ARMS)}"
            )
    if not arms or len(set(arms)) != len(arms):
        raise ConfigError(f"arms is {text!r}; expected each of {','.join(ARMS)} once at most")
    return arms


def _hot_gib(block_size: int, work: Work, token_bytes: int) -> float:
    """Where no size is given: a quarter of what the work needs.

    With shared prefixes all of it, so that the requests that share one can run at once.
    """
    needed = work.kv_tokens if work.prefixes else work.kv_tokens / _CONTEXTS_PER_HOT
    tokens = max(needed, work.longest_context + 64, 320)
    blocks = -(-int(tokens) // block_size)
    return (blocks + 0.5) * block_size * token_bytes / GIB


def _with_hot_tier(config: Options, hot_gib: float, model: PreTrainedModel) -> Options:
    """The options with a size that is chosen for KV alone, and leaves experts out."""
    slots = slot_bytes_of(model, HostedExperts())
    if slots is None or isinstance(config.experts, ExpertSlots | ExpertBudget):
        return config.but(hot_gib=hot_gib)
    return config.but(hot_gib=hot_gib, expert_slots=slots.num_experts)


def _release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _counters(engine: Engine) -> dict[str, Any]:
    """A copy of all counters."""
    values = {f.name: getattr(engine.metrics, f.name) for f in fields(engine.metrics)}
    return {name: dict(v) if isinstance(v, Counter) else v for name, v in values.items()}


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in after.items():
        if isinstance(value, dict):
            counts = {key: value[key] - before[name].get(key, 0) for key in sorted(value)}
            found[name] = {key: count for key, count in counts.items() if count}
        else:
            found[name] = value - before[name]
    return found


def _engine_figures(counters: dict[str, Any]) -> dict[str, Any]:
    """The counters, and what follows from them."""
    steps = counters["steps"]
    needed = counters["expert_hits"] + counters["expert_misses"]
    return counters | {
        "mean_step_ms": counters["step_s"] / steps * 1e3 if steps else None,
        "expert_hit_rate": counters["expert_hits"] / needed if needed else None,
    }


def _progress(arm: str, engine: Engine, play: Play, now_s: float) -> str:
    rate = (play.prompt_tokens + play.output_tokens) / max(now_s, 1e-9)
    scheduler = engine.scheduler
    return (
        f"{arm}: {now_s:.0f} s, {play.num_ended} of {play.work.num_requests} requests, "
        f"{rate:,.0f} tokens/s, {len(scheduler.running)} running, {len(scheduler.waiting)} waiting"
    )


def describe_error(error: Exception) -> str:
    """One line of an error that ended a run."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, HotsetError) else f"{type(error).__name__}: {text}"
