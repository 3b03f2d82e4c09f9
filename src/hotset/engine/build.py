"""From a loaded model to an engine that runs: size, place, compile, measure, open."""

import math
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch

from hotset.attention.state_tables import GRID
from hotset.clock import REAL_CLOCK, Clock
from hotset.cost.cache_spec import groups_of
from hotset.cost.prefix import PrefixPolicy
from hotset.cost.rates import Rates
from hotset.cost.tuning import TUNINGS
from hotset.cost.workspace import most_scored_rows
from hotset.engine.engine import Engine
from hotset.engine.hot_setup import seats_in
from hotset.engine.lane import Lane
from hotset.engine.model_shape import hot_choice, index_note, kv_note
from hotset.engine.open_tiers import HostMemory, open_tiers
from hotset.engine.outputs import OutputProcessor
from hotset.engine.parts import EngineParts
from hotset.engine.rank_setup import Placed, RankSetup
from hotset.engine.scheduler import Scheduler
from hotset.engine.sizing import Sizes
from hotset.engine.split_mover import SplitMover
from hotset.engine.start_times import StartTimes
from hotset.engine.step_cost import StepCost
from hotset.executor.executor import Executor
from hotset.executor.local import LocalExecutor
from hotset.executor.runner import ModelRunner
from hotset.executor.sampler import Sampler
from hotset.executor.simulated import Simulated
from hotset.expert_options import HostedExperts
from hotset.experts.gating import unpack_experts
from hotset.grammar.json_bounds import JsonBounds
from hotset.kernels.device import likely_hardware
from hotset.kv.cache import KVCache
from hotset.kv.pool import BlockPool
from hotset.kv.state_slots import StateSlots
from hotset.layout import Layout
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import payloads_within
from hotset.memory.tiers import TierStack
from hotset.metrics import Metrics
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.parallel.group import current
from hotset.ranks.copier import FarHost, FarSlots, RanksCopier
from hotset.ranks.disk import RanksDisk
from hotset.ranks.driver import Ranks
from hotset.ranks.executor import RankedExecutor
from hotset.ranks.facts import machine_facts
from hotset.ranks.memory import RanksMemory, ranks_table
from hotset.ranks.rank import Rank
from hotset.ranks.slab_files import RankSlab

_LAYOUT_VERSION, _SIDE_BY_SIDE_VERSION = "1", "2"
_FLASHINFER = "flashinfer-python"
_STATE_NOTE = (
    "layers keep a state beside KV: prefixes are found up to states that were kept, and a "
    "preempted request without a state in host memory goes on from the last of these"
)


def build_engine(
    options: Options,
    loaded: LoadedModel,
    *,
    overlap: bool | None = None,
    owns_model: bool = False,
    defers_recording: bool = False,
    times: StartTimes | None = None,
    clock: Clock = REAL_CLOCK,
    simulated: Simulated | None = None,
) -> Engine:
    """Set up an engine over a loaded model.

    Args:
        options: the user's.
        loaded: the model.
        overlap: whether steps overlap; None is on a GPU only.
        owns_model: whether the engine alone uses the model, so that its experts on disk go with
            the engine.
        defers_recording: whether to be ready before all steps are recorded, and all kernels built:
            `Engine.warm_up` does the rest.
        times: what this takes is added to it.
        clock: of waits, deadlines and rates while it runs.
        simulated: what a benchmark puts in place of work, with sparse attention; None is nothing.

    Raises:
        ConfigError: sizes that cannot work; `ModelError`: a model that cannot run;
            `TierError`: a disk tier that cannot be opened. Nothing is left behind.
    """
    times, simulated = times or StartTimes(), simulated or Simulated()
    with ExitStack() as undo:

        def set_up() -> tuple[_Build, Placed, ModelRunner, _Measured]:
            build = _Build(options, loaded, defers_recording, times, simulated)
            placed = build.place(build.size(), undo, owns_model=owns_model)
            runner = build.compile(placed)
            return build, placed, runner, build.measure(placed, runner)

        ranks: Ranks | None = loaded.ranks
        if ranks is None:
            build, placed, runner, measured = set_up()
        else:
            # What is selected is noted here, and is the same on all of them.
            arguments = (options, defers_recording, replace(simulated, recorder=None))
            build, placed, runner, measured = ranks.build(build_rank, arguments, set_up)
        local = LocalExecutor(
            runner,
            measured.sampler,
            placed.experts,
            owns_model=owns_model,
            selections=simulated.recorder,
        )
        executor: Executor = local
        if ranks is not None:
            undo.callback(ranks.end)
            ranks.check_facts({**machine_facts(), **build.facts(placed)})
            executor = RankedExecutor(
                local, ranks, scratch_block=placed.scratch_block, owns_ranks=owns_model
            )
        parts = build.open(placed, executor, measured, clock, undo)
        undo.pop_all()
    return Engine(parts if overlap is None else replace(parts, overlaps=overlap))


def build_rank(
    loaded: LoadedModel, options: Options, defers_recording: bool, simulated: Simulated
) -> Rank:
    """Set up another rank than the driver's, at the same time as `build_engine` its own.

    Raises what that raises.
    """
    if isinstance(options.experts, HostedExperts):
        unpack_experts(loaded.model)  # as an engine before may have packed them
    setup = RankSetup(options, loaded, defers_recording, StartTimes(), simulated)
    with ExitStack() as undo:
        sizes = setup.size()
        placed = setup.place(sizes, undo, owns_model=False)
        runner = setup.compile(placed)
        setup.try_steps(placed, runner)
        host = slab = None
        if sizes.host_slots:
            host = HostMemory.take(sizes, placed.payloads)
            undo.callback(host.copier.close)
        if sizes.disk_bytes:
            slot_bytes = slot_bytes_for(sizes.block_bytes)
            num_slots = payloads_within(sizes.disk_bytes, slot_bytes)
            slab = RankSlab(setup.disk_path, slot_bytes=slot_bytes, num_slots=num_slots)
        if placed.experts is not None:
            placed.experts.reset_counts()
        undo.pop_all()
    return Rank(
        runner,
        placed.payloads,
        placed.experts,
        None if host is None else host.arena,
        None if host is None else host.copier,
        slab,
        setup.facts(placed),
        setup.meter(sizes),
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was found out by running steps."""

    sampler: Sampler
    step_cost: StepCost
    rates: Rates
    notes: tuple[str, ...]


class _Build(RankSetup):
    """The phases of an engine's set-up, after its rank's."""

    def measure(self, placed: Placed, runner: ModelRunner) -> _Measured:
        """How long steps take here, and where the CPU is to compute experts."""
        options, loaded, notes = self._options, self._loaded, []
        sampler = Sampler(
            self._model.config.get_text_config().vocab_size,
            device=self._device,
            seed=options.runtime.seed,
            tokenizer=loaded.tokenizer,
            eos_token_ids=loaded.eos_token_ids,
            bounds=JsonBounds.of(options.forms),
        )
        with self._times.phase("try steps"):
            sampler.load_kernels(self._layout.dtype)
            trials = self.try_steps(placed, runner)
        num_tokens, seconds = trials[-1]
        rates = Rates.of_hardware(likely_hardware(self._device), num_gpus=current().size)
        rates.prefill_tokens_per_s = num_tokens / seconds
        experts, asked = placed.experts, options.experts
        on_cpu = asked.expert_cpu if isinstance(asked, HostedExperts) else "off"
        has_cold = experts is not None and experts.num_slots < experts.sizes.num_experts
        if experts is not None and has_cold and on_cpu != "off" and self._device.type == "cuda":
            notes.append(experts.compute_cold_on_cpu(on_cpu, threads=options.runtime.threads))
            runner.launches = experts.launches
        return _Measured(sampler, StepCost(trials), rates, tuple(notes))

    def open(
        self,
        placed: Placed,
        executor: Executor,
        measured: _Measured,
        clock: Clock,
        undo: ExitStack,
    ) -> EngineParts:
        """Tiers and scheduler of each lane, and what is told at start."""
        sizes, experts, metrics = placed.sizes, placed.experts, Metrics()
        memory, fingerprint = self._options.memory, self._fingerprint(sizes)
        numerics = self._numerics()
        with self._times.phase("open tiers"):
            hosts: Sequence[HostMemory | FarHost | None] = [placed.host]
            peers, ranks_memory = None, RanksMemory(self.meter(sizes))
            if isinstance(executor, RankedExecutor):
                hosts, peers = self._join_ranks(placed, executor, ranks_memory)
            stacks = [
                open_tiers(
                    memory,
                    sizes,
                    placed.payloads,
                    host,
                    measured.rates,
                    metrics,
                    self.disk_path,
                    fingerprint,
                    numerics,
                    undo,
                    clock,
                    peers,
                )
                for host in hosts
            ]
        lanes = []
        for tiers in stacks:
            kv = self._kv_cache(placed, tiers, measured.rates, metrics, repr(fingerprint))
            lanes.append(Lane(self._scheduler(placed, kv, measured, metrics, clock), tiers))
        mover = None
        if sizes.moving is not None:
            assert experts is not None
            [lane] = lanes
            mover = SplitMover(
                sizes.moving, experts, placed.arena, lane.kv.pool, lane.scheduler, clock
            )
        if experts is not None:
            experts.reset_counts()  # those of the trials above
            metrics.expert_rounding_error = experts.rounding_error
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what trials took and is not kept is others' to have
        return EngineParts(
            options=self._options,
            sizes=sizes,
            report=self._report(placed, measured, ranks_memory),
            memory=ranks_memory.read,
            numerics=numerics,
            overlaps=self._device.type == "cuda",
            executor=executor,
            outputs=OutputProcessor(self._loaded.tokenizer, self._loaded.eos_token_ids),
            lanes=lanes,
            rates=measured.rates,
            step_cost=measured.step_cost,
            experts=experts,
            mover=mover,
            clock=clock,
        )

    def _join_ranks(
        self, placed: Placed, executor: RankedExecutor, memory: RanksMemory
    ) -> tuple[Sequence[HostMemory | FarHost | None], RanksDisk | None]:
        """Host memory of each lane, None where none is asked for; and disks of all ranks as one."""
        ranks: Ranks = self._loaded.ranks
        num_lanes = current().layout.dp
        if placed.sizes.host_slots == 0:
            ranks.listen([executor.take, memory.take])
            return [None] * num_lanes, None
        host = HostMemory.take(placed.sizes, placed.payloads)
        if num_lanes > 1:
            return self._hosts_of_lanes(placed, executor, memory, host), None
        others = range(1, ranks.size)
        copier = RanksCopier(host.copier, ranks, placed.payloads, host.arena, memory, others=others)
        disk = RanksDisk(ranks, host.arena)
        ranks.listen([executor.take, memory.take, copier.take, disk.take])
        copier.wait_ready()
        return [HostMemory(host.arena, copier)], disk

    def _hosts_of_lanes(
        self, placed: Placed, executor: RankedExecutor, memory: RanksMemory, own: HostMemory
    ) -> list[HostMemory | FarHost]:
        """Host memory of each rank, which its lane alone copies to and from."""
        ranks: Ranks = self._loaded.ranks
        payloads, slots = placed.payloads, FarSlots(own.arena.slot_bytes)
        first = RanksCopier(own.copier, ranks, payloads, own.arena, memory, others=[])
        others = [
            RanksCopier(None, ranks, payloads, slots, memory, others=[rank])
            for rank in range(1, ranks.size)
        ]
        ranks.listen([executor.take, memory.take, *(copier.take for copier in others)])
        for copier in others:
            copier.wait_ready()
        return [HostMemory(own.arena, first), *(FarHost(slots, copier) for copier in others)]

    def _kv_cache(
        self,
        placed: Placed,
        tiers: TierStack | None,
        rates: Rates,
        metrics: Metrics,
        fingerprint: str,
    ) -> KVCache:
        sizes, memory = placed.sizes, self._options.memory
        hot, states = sizes.hot, sizes.states
        pool = BlockPool(sizes.num_blocks, sizes.first_block)
        policy = PrefixPolicy(
            rates,
            bytes_per_token=self._layout.bytes_per_token,
            state_bytes=0 if states is None else states.slot_bytes,
            mode=memory.fetch_policy,
        )
        seats = index_blocks = None
        if hot is not None:
            seats, index_blocks = seats_in(pool, hot, sizes)
        return KVCache(
            pool,
            block_size=sizes.block_size,
            fingerprint=fingerprint,
            metrics=metrics,
            tiers=tiers,
            policy=policy if tiers is not None else None,
            prefix_caching=memory.prefix_caching,
            seats=seats,
            index_blocks=index_blocks,
            states=self._state_slots(sizes),
            pieces=placed.payloads.pieces if states and states.go_down(sizes.host_slots) else None,
        )

    def _state_slots(self, sizes: Sizes) -> StateSlots | None:
        """On the grid of scans, where blocks end too; convolutions alone have none."""
        if sizes.states is None:
            return None
        has_scan = any(spec.recurrent for spec in self._layout.states.values())
        grid = math.lcm(GRID, sizes.block_size) if has_scan else sizes.block_size
        return StateSlots(sizes.states.num_slots, grid=grid)

    def _scheduler(
        self, placed: Placed, kv: KVCache, measured: _Measured, metrics: Metrics, clock: Clock
    ) -> Scheduler:
        schedule, device = self._schedule, self._device.type
        most_scored = most_scored_rows(  # of all lanes, as rank 0 gets their logits
            measured.sampler.vocab_size, self._layout.dtype.itemsize, device
        )
        return Scheduler(
            kv,
            metrics=metrics,
            max_num_seqs=schedule.max_num_seqs,
            max_num_batched_tokens=schedule.max_num_batched_tokens,
            max_mixed_tokens=placed.sizes.max_mixed_tokens,
            max_scored_tokens=max(1, most_scored // current().layout.dp),
            # On a CPU more rows are no faster, and a step of many takes seconds.
            bursts=device == "cuda",
            row_tile=TUNINGS[device].row_tile,
            rotation_s=schedule.rotation_s,
            users_at_once=self._hot_choice(placed.sizes),
            step_cost=measured.step_cost,
            clock=clock,
        )

    def _hot_choice(self, sizes: Sizes) -> Callable[[int, float], int] | None:
        if sizes.hot is None:
            return None
        return hot_choice(self._loaded, self._layout, sizes, self._options)

    def _fingerprint(self, sizes: Sizes) -> dict[str, str]:
        """What stored blocks depend on: another value of any of these is another chain of keys."""
        layout, asked = self._layout, self._options.experts
        cold = asked.expert_cold_dtype if isinstance(asked, HostedExperts) else "auto"
        is_grouped = any(len(group) > 1 for group in groups_of(list(map(bool, layout.index_dims))))
        rounded = "" if cold == "auto" else f" experts {cold}"
        index = "" if layout.index_dtype is None else f" {layout.index_dtype}"
        num_ranks = current().size
        return {
            **({} if num_ranks == 1 else {"ranks": str(num_ranks)}),
            "layout": _SIDE_BY_SIDE_VERSION if is_grouped else _LAYOUT_VERSION,
            "weights": f"{self._loaded.fingerprint}{rounded}",
            "dtype": str(layout.dtype),
            "kv_dtype": f"{layout.kv_dtype} {self._kv_scales}",
            "block_size": str(sizes.block_size),
            "shape": f"{layout.cache_specs} {layout.index_dims}{index}{layout.states or ''}",
        }

    def _numerics(self) -> str:
        """What the last bits of computed numbers depend on: blocks of others may differ in them."""
        where = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {self._threads}"
        if self._device.type == "cuda":
            kernels = "SDPA" if self._kernels is None else f"FlashInfer {version(_FLASHINFER)}"
            eager = " eager" if self._options.runtime.eager else ""
            where = f"{torch.cuda.get_device_name(self._device)} {kernels}{eager}"
        spread = current().layout
        more = "" if spread == Layout(spread.tp) else f" of {spread}"
        return f"{where} torch {torch.__version__} tp {spread.tp}{more}"

    def _report(self, placed: Placed, measured: _Measured, memory: RanksMemory) -> str:
        sizes = placed.sizes
        lines = [sizes.report(device=self._device.type, disk_path=self.disk_path)]
        if self._device.type == "cpu":
            lines.append(f"threads that compute: {self._threads}")
        if placed.states is not None:
            lines.append(_STATE_NOTE)
        if (num_ranks := current().size) > 1:
            spread = current().layout
            lines.append(f"{spread}: what is told here is of each of {num_ranks} ranks")
            lines.append(ranks_table(memory.read()))
            lines += [self._ranks_note, self._link_note()]
        lines += [kv_note(self._model, self._layout), index_note(self._model, self._layout)]
        lines += [sizes.split_report, placed.experts_report]
        return "\n".join(line for line in [*lines, *measured.notes, *self._loaded.notes] if line)
