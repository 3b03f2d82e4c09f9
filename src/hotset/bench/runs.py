"""Running the arms: a fresh engine for each over the same weights, one after the other."""

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hotset.attention.sparse.drawn import DrawnSelection
from hotset.attention.sparse.recorder import SelectionRecorder
from hotset.bench.arms import options_of, with_hot_tier
from hotset.bench.driver import Driven, drive, wait_for_host_tier
from hotset.bench.figures import counters_since, sizes_of
from hotset.bench.machine import release
from hotset.bench.play import Play
from hotset.bench.predict import predict_arm
from hotset.bench.profiler import StepProfiler
from hotset.bench.result import ArmRun, observe
from hotset.bench.steady import Steady, SteadyRun, planned_step, steady_run
from hotset.bench.workload import Spec, filler, make_work, prefix_work, warm_up
from hotset.cost.loaded import make_cost_model
from hotset.cost.routing import Routing, skewed_shares
from hotset.cost.selection import GUESSED
from hotset.cost.step_time import CostModel
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.model_shape import kv_note
from hotset.engine.start_times import StartTimes
from hotset.engine.status import engine_usage
from hotset.errors import ConfigError, HotsetError, PlanError
from hotset.executor.probe import inspect_model
from hotset.executor.simulated import Simulated
from hotset.experts.recorder import RoutingRecorder, write_routing
from hotset.kernels.device import known_hardware
from hotset.model.devices import resolve_kv_dtype
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.plan.selection_file import load_selections, save_selections

_NEVER = 1_000_000  # collections of middle-aged objects before one of all


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How runs are made.

    Attributes:
        profile_steps: number of steps to profile in each run; 0 for none.
        max_s: a run ends after this many seconds, done or not.
        hardware: name of the profile for predictions; None chooses one.
        verify: keep the answers.
        wait_for_tiers: start the run only when all host memory is pinned.
        record_routing: file for what experts the tokens of the first run went to; None for none.
        record_selection: file for what tokens decodes of the first run selected; None for none.
        steady_steps: how many steps are timed, of decodes alone and in a steady state, over prompts
            that are put in place and not computed; 0 and None play all of the work. See
            `bench.steady`.
        steady_users: how many requests are offered for it, one number after another; empty is all.
        selection_overlap: of what sparse attention selects in neighbouring steps, which is drawn;
            None leaves it to the weights.
        selection_guessed: of a selection that is drawn, the share that its guess has.
        router_skew: see `router_skew.skew_routers`; None leaves random weights as they are.
    """

    profile_steps: int = 0
    max_s: float | None = None
    hardware: str | None = None
    verify: bool = False
    wait_for_tiers: bool = True
    record_routing: Path | None = None
    record_selection: Path | None = None
    steady_steps: int | None = None
    steady_users: tuple[int, ...] = ()
    selection_overlap: float | None = None
    selection_guessed: float = GUESSED
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
    """The arms of one model and workload.

    Attributes:
        work: what is run.
        notes: lines for the result.
    """

    def __init__(
        self,
        spec: Spec,
        config: Options,
        loaded: LoadedModel,
        options: RunOptions,
        say: Say,
    ) -> None:
        self._spec, self._loaded, self._options, self._say = spec, loaded, options, say
        model = loaded.model
        self._device: torch.device = model.device
        self._vocab_size: int = model.config.get_text_config().vocab_size
        longest = loaded.max_model_len
        max_context = min(config.schedule.max_model_len or longest, longest)
        self.work = make_work(spec, self._vocab_size, max_context=max_context, model=loaded)
        asked = config.model
        self._layout = inspect_model(
            model,
            resolve_kv_dtype(asked.kv_dtype, model.device),
            resolve_kv_dtype(asked.index_dtype, model.device, "index_dtype"),
        )
        self._config = with_hot_tier(config, self.work, self._layout, model)
        self.notes: list[str] = []
        # Before the first engine, which may compile the model with it.
        self._recorder = RoutingRecorder(model) if options.record_routing is not None else None
        self._selections = self._selection_recorder()
        self._cost = self._cost_model()

    @property
    def _dtype(self) -> str:
        if self._config.model.dtype == "fp8":
            return "fp8"
        return str(self._loaded.model.dtype).removeprefix("torch.")

    def facts(self) -> dict[str, Any]:
        """The model, for results."""
        return {
            "model": self._loaded.name,
            "dtype": self._dtype,
            "kv_dtype": self._config.model.kv_dtype,
            "index_dtype": self._config.model.index_dtype,
            "device": str(self._device),
            "hot_gib": self._config.memory.hot_gib,
        }

    def run(self, arm: str, repeat: int) -> ArmRun:
        """Start an engine for `arm`, warm it up, play the workload, and release its memory.

        Raises:
            HotsetError: the engine cannot be started with these sizes, or broke off.
        """
        with ExitStack() as stack:
            config = options_of(
                arm, self._config, self.work, self._layout, self._loaded.model, stack
            )
            release(self._device)
            start_s = time.perf_counter()
            times = StartTimes()
            engine = build_engine(config, self._loaded, simulated=self._simulated(), times=times)
            started_s = time.perf_counter() - start_s
            try:
                report = f"{engine.report}\n{times.report()}"
                self._say.line(f"{arm}: started in {started_s:.1f} s\n{report}")
                run = self._measure(engine, arm, repeat)
            finally:
                engine.close()
                del engine
                release(self._device)
        run.start_s, run.budget_report = started_s, report
        return run

    def _measure(self, engine: Engine, arm: str, repeat: int) -> ArmRun:
        if self.work.longest_context > engine.max_model_len:
            raise ConfigError(
                f"the workload has contexts of {self.work.longest_context} tokens but the hot tier "
                f"serves {engine.max_model_len}; give more hot_gib"
            )
        sizes = sizes_of(engine, self._loaded.model, self.work)
        tiers_ready_s = wait_for_host_tier(engine) if self._options.wait_for_tiers else None
        if self._options.steady_steps:
            with self._selection_recorded(arm):
                run = self._steady(engine, arm, repeat)
            run.tiers_ready_s, run.sizes = tiers_ready_s, sizes
            return run
        warm_up_s, prepare_s = self._prepare(engine)
        before = copy.deepcopy(engine.metrics)
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        with (
            self._profiled(arm) as profiler,
            self._routing_recorded(engine, arm),
            self._selection_recorded(arm),
            _without_full_collections(),
        ):
            driven = self._drive(engine, arm, profiler)
        run = observe(arm, repeat, driven.play, driven.wall_s, is_complete=driven.is_complete)
        if not self._options.verify:
            run.outputs.clear()
        run.tiers_ready_s, run.warm_up_s, run.prepare_s = tiers_ready_s, warm_up_s, prepare_s
        run.sizes, run.engine = sizes, counters_since(before, engine)
        run.samples = dict(driven.watch.samples)
        run.peak_host_rss_bytes = driven.watch.peak_host_rss_bytes
        if is_cuda:
            run.peak_device_bytes = torch.cuda.max_memory_reserved()
        if profiler is not None:
            run.notes.append("profiled: times are longer than without")
        if not driven.is_complete:
            run.notes.append(f"broken off after {driven.wall_s:.0f} s")
        if self._cost is not None:
            run.prediction = predict_arm(self._cost, self.work, engine, sizes, run.engine)
        return run

    def _simulated(self) -> Simulated:
        """What takes the place of work with random weights, and notes what is selected."""
        options, drawn = self._options, None
        if (overlap := options.selection_overlap) is not None:
            count = getattr(self._loaded.model.config.get_text_config(), "index_topk", None)
            if count is None:
                raise ConfigError(
                    f"selection_overlap is {overlap}, but {self._loaded.name} selects no tokens; "
                    "leave it out, or give a model with sparse attention, such as dsa-8l"
                )
            context = self.work.longest_context - self.work.sessions[0].turns[0].output_tokens // 2
            drawn = DrawnSelection.of_overlap(
                overlap, context=context, count=count, guessed=options.selection_guessed
            )
        return Simulated(drawn, bool(options.steady_steps), self._selections)

    def _steady(self, engine: Engine, arm: str, repeat: int) -> ArmRun:
        options, num_steps = self._options, self._options.steady_steps
        assert num_steps

        def progress(state: Callable[[], str]) -> None:
            self._say.progress(lambda: f"{arm}: {state()}")

        steady = SteadyRun(engine, self.work, progress)
        found: list[Steady] = []
        for offered in options.steady_users or (self.work.num_requests,):
            one = steady.measure(offered, num_steps, most_fill_s=options.max_s)
            overlap, guessed = options.selection_overlap, options.selection_guessed
            if self._cost is not None and overlap is not None:
                planned = planned_step(self._cost, engine, one, overlap, guessed)
                one = replace(one, planned=planned)
            found.append(one)
            self._say.line("\n".join(one.lines(f"{arm}, {offered} offered")))
        run = steady_run(arm, repeat, found, steady.outputs if options.verify else {})
        run.engine |= {"turned_hot": engine.metrics.turned_hot}
        return run

    def _prepare(self, engine: Engine) -> tuple[float, float]:
        """Warm up, and compute shared prefixes; the seconds of both."""
        begin_s = time.perf_counter()
        length, is_small = engine.max_model_len, self._device.type == "cpu"
        drive(engine, warm_up(self._spec, self._vocab_size, length, is_small=is_small))
        warm_s = time.perf_counter()
        if self.work.prefixes:  # once, and then they are pushed out of the device
            drive(engine, prefix_work(self.work))
            hot_tokens = engine.sizes.device_blocks * engine.sizes.block_size
            drive(engine, filler(hot_tokens, length, self._vocab_size))
        engine.take_counts()
        return warm_s - begin_s, time.perf_counter() - warm_s

    def _drive(self, engine: Engine, arm: str, profiler: StepProfiler | None) -> Driven:
        def progress(play: Play, now_s: float) -> None:
            self._say.progress(lambda: _progress(arm, engine, play, now_s))

        return drive(engine, self.work, max_s=self._options.max_s, progress=progress, hook=profiler)

    @contextmanager
    def _profiled(self, arm: str) -> Iterator[StepProfiler | None]:
        if not self._options.profile_steps:
            yield None
            return
        profiler = StepProfiler(self._options.profile_steps, self._device)
        try:
            yield profiler
        finally:
            profiler.close()
        self._say.line(f"{arm}: profile\n{profiler.report}")

    @contextmanager
    def _routing_recorded(self, engine: Engine, arm: str) -> Iterator[None]:
        """Record the first run, if that was asked for."""
        recorder, self._recorder = self._recorder, None
        engine.record_routing(recorder)
        try:
            yield
        finally:
            engine.record_routing(None)
        path = self._options.record_routing
        if recorder is None or path is None:
            return
        about = self.facts() | {
            "workload": self.work.title,
            "arm": arm,
            "num_experts": recorder.num_experts,
            "top_k": getattr(
                self._loaded.model.config.get_text_config(), "num_experts_per_tok", None
            ),
        }
        num_steps = write_routing(path, recorder, about)
        self._say.line(f"{arm}: routing of {num_steps} steps in {path}")
        self.notes.append(f"routing was counted, in {path}: each step took a little longer")

    def _selection_recorder(self) -> SelectionRecorder | None:
        """What notes the selections of the first run, if that was asked for."""
        if (path := self._options.record_selection) is None:
            return None
        if self._layout.layers[0].indexer is None:
            raise ConfigError(
                f"record_selection is {path}, but {self._loaded.name} selects no tokens; leave it "
                "out, or give a model with sparse attention"
            )
        rows = self._config.schedule.max_num_seqs
        return SelectionRecorder(self._layout.layers, num_rows=rows, device=self._device)

    @contextmanager
    def _selection_recorded(self, arm: str) -> Iterator[None]:
        """Record what the first run selects, if that was asked for."""
        recorder, self._selections = self._selections, None
        path = self._options.record_selection
        if recorder is None or path is None:
            yield
            return
        recorder.is_on = True
        yield
        requests = recorder.requests()
        save_selections(path, requests, self.facts() | {"workload": self.work.title, "arm": arm})
        found = load_selections(path)
        overlaps = " ".join(f"{each:.2f}" for each in found.layer_overlaps)
        num_steps = sum(map(len, found.requests))
        self._say.line(
            f"{arm}: {num_steps} selections per layer, of {len(found.requests)} requests, in "
            f"{path}; overlap {found.overlap:.2f}, by layer {overlaps}"
        )
        self.notes.append(f"selections were recorded, in {path}: each step took longer")

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
        if (spread := self._config.layout.spread).dp > 1:
            self.notes.append(f"no prediction: steps of {spread} are several lanes' together")
            return None
        try:
            cost = make_cost_model(
                model.config.to_dict(),
                self._loaded.name,
                self._dtype,
                hardware,
                kv_dtype=self._config.model.kv_dtype,
                index_dtype=self._config.model.index_dtype,
                layout=spread,
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


@contextmanager
def _without_full_collections() -> Iterator[None]:
    """As in the server, collections leave model and workload alone."""
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)


def _progress(arm: str, engine: Engine, play: Play, now_s: float) -> str:
    rate = (play.prompt_tokens + play.output_tokens) / max(now_s, 1e-9)
    usage = engine_usage(engine)
    return (
        f"{arm}: {now_s:.0f} s, {play.num_ended} of {play.work.num_requests} requests, "
        f"{rate:,.0f} tokens/s, {usage.num_running} running, {usage.num_waiting} waiting"
    )


def describe_error(error: Exception) -> str:
    """One line of an error that ended a run."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, HotsetError) else f"{type(error).__name__}: {text}"
