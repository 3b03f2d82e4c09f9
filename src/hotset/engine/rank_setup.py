"""What each rank of an engine sets up: sizes, experts, memory for KV, and the model that runs."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs

from hotset.attention.choice import choose_backend
from hotset.attention.flashinfer.kernels import start_kernels
from hotset.attention.flashinfer.sparse import SparseBackend
from hotset.attention.gather import GatherBackend
from hotset.attention.hot_rows import HotRows
from hotset.attention.sparse.indexer import bind_guesses
from hotset.cgroups import available_host_bytes
from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.wire import Wire
from hotset.cpu_libraries import bound_kernels, set_threads
from hotset.engine.hot_setup import place_hot_rows
from hotset.engine.model_shape import measure_model
from hotset.engine.open_tiers import HostMemory
from hotset.engine.sizing import FreeBytes, Sizes, solve_sizes
from hotset.engine.start_times import StartTimes
from hotset.engine.trials import time_prompts
from hotset.errors import ConfigError
from hotset.executor.probe import inspect_model
from hotset.executor.runner import ModelRunner
from hotset.executor.simulated import PlacingRunner, Simulated
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.gating import pack_experts
from hotset.experts.hosting import buffer_experts
from hotset.kernels.device import likely_hardware
from hotset.linear.packed import pack_linears
from hotset.memory.arena import DeviceArena
from hotset.memory.device_payloads import DevicePayloads
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.state_arena import StateArena
from hotset.model.devices import free_bytes, resolve_kv_dtype
from hotset.model.loaded import LoadedModel
from hotset.option_groups import ScheduleOptions
from hotset.options import Options
from hotset.parallel.collectives import use_symmetric_memory
from hotset.parallel.group import current, has_peers, least
from hotset.ranks.memory import Meter


@dataclass(frozen=True, slots=True)
class Placed:
    """Experts and KV, where they stay.

    Attributes:
        experts: None where all are resident.
        experts_report: what to say of them at start; empty for nothing.
        host: memory that steps read, as requests may be hot; None where it is taken later.
        hot: their rows; None where none may be hot.
        states: what layers keep beside KV; None where they keep nothing.
        payloads: what tiers copy of both.
    """

    sizes: Sizes
    experts: ExpertBuffer | None
    experts_report: str
    arena: DeviceArena
    host: HostMemory | None
    hot: HotRows | None
    states: StateArena | None
    payloads: DevicePayloads

    @property
    def scratch_block(self) -> int:
        """A block of `arena` that no request gets, for rows of padding."""
        return self.sizes.num_blocks


class RankSetup:
    """The phases of a rank's set-up. Each returns what it made; `undo` takes back what it leaves.

    Args:
        options: the user's.
        loaded: the model.
        defers: whether most steps are recorded later.
        times: what this takes is added to it.
        simulated: what a benchmark puts in place of work.

    Raises:
        ConfigError: options that the model cannot follow; `ModelError`: it cannot run.
    """

    def __init__(
        self,
        options: Options,
        loaded: LoadedModel,
        defers: bool,
        times: StartTimes,
        simulated: Simulated,
    ) -> None:
        bound_kernels()
        # Whose memory is no longer free then; lanes have nothing that all of them sum.
        self._ranks_note = use_symmetric_memory() if current().layout.dp == 1 else ""
        self._threads = set_threads(options.runtime.threads)
        self._options, self._loaded = options, loaded
        self._schedule = _of_lane(options.schedule, current().layout.dp)
        self._model, self._device = loaded.model, loaded.model.device
        self._defers, self._times = defers, times
        self._simulated = simulated
        with times.phase("look at the layers"):
            asked = options.model
            kv_dtype = resolve_kv_dtype(asked.kv_dtype, self._device)
            index_dtype = resolve_kv_dtype(asked.index_dtype, self._device, "index_dtype")
            self._layout = inspect_model(self._model, kv_dtype, index_dtype)
        self._check_lanes(loaded.name)
        if simulated != Simulated() and self._layout.layers[0].indexer is None:
            raise ConfigError(
                f"{loaded.name} has no sparse attention, whose selections and contexts could be "
                "drawn; give a model with an indexer, such as dsa-8l"
            )
        self._kernels = start_kernels(self._layout.layers, self._layout.kv_dtype, self._device)
        with times.phase("pack weights"):
            pack_linears(self._model)

    def _check_lanes(self, name: str) -> None:
        """Raise ConfigError where lanes cannot run what one can."""
        if current().layout.dp == 1:
            return
        why = None
        if self._layout.states:
            why = "keep a state beside KV"
        elif self._layout.layers[0].indexer is not None:
            why = "select what they attend to"
        if why is not None:
            raise ConfigError(
                f"layers of {name} {why}, which does not go with dp yet; give tp in its place"
            )

    def size(self) -> Sizes:
        """What each part gets of the memory: on all ranks the same."""
        of_host = available_host_bytes() // current().num_local
        free = of_host if self._device.type == "cpu" else free_bytes(self._device)
        device, host = least([free, of_host])
        # Of all lanes together, as experts compute the tokens of all.
        model = measure_model(self._loaded, self._layout, self._options)
        of_lane = replace(self._options, schedule=self._schedule)
        return solve_sizes(of_lane, model, FreeBytes(device, host))

    def place(self, sizes: Sizes, undo: ExitStack, *, owns_model: bool) -> Placed:
        """Experts and memory for KV.

        Comes before anything else runs the model: its experts may still be where they were loaded.
        """
        with self._times.phase("place experts"):
            experts, report = buffer_experts(
                self._model,
                self._options.experts,
                sizes.experts,
                region=None if sizes.moving is None else sizes.moving.region,
                read_deadline_s=self._options.memory.disk_read_deadline_s,
            )
            if experts is not None:
                undo.callback(experts.close, with_disk=owns_model)
            pack_experts(self._model)
        with self._times.phase("take KV memory"):
            arena = DeviceArena(
                self._layout.cache_specs,
                num_blocks=sizes.num_blocks + 1,  # with the scratch block
                block_size=sizes.block_size,
                dtype=self._layout.kv_dtype,
                device=self._device,
                scales=self._kv_scales,
                memory=None if experts is None else experts.memory,
                index_dims=self._layout.index_dims,
                index_dtype=self._layout.index_dtype,
            )
            states = self._state_arena(sizes)
            payloads = DevicePayloads(arena, states)
            host = hot = None
            if sizes.hot is not None:
                host = HostMemory.take(sizes, payloads)
                undo.callback(host.copier.close)
                hot = place_hot_rows(
                    sizes.hot,
                    sizes,
                    arena,
                    host,
                    fetches_ahead=self._options.memory.row_prefetch > 0,
                )
        return Placed(sizes, experts, report, arena, host, hot, states, payloads)

    def _state_arena(self, sizes: Sizes) -> StateArena | None:
        if sizes.states is None:
            return None
        arena = StateArena(
            self._layout.states,
            num_slots=sizes.states.num_all_slots,
            dtype=self._layout.dtype,
            device=self._device,
        )
        assert arena.slot_bytes == sizes.states.slot_bytes
        return arena

    @property
    def _kv_scales(self) -> tuple[tuple[float, float], ...] | None:
        is_rounded = self._layout.kv_dtype != self._layout.dtype
        return self._loaded.kv_scales if is_rounded else None

    def compile(self, placed: Placed) -> ModelRunner:
        """The model with its attention; on a GPU compiled, and the first steps recorded."""
        sizes, experts, times = placed.sizes, placed.experts, self._times
        schedule = self._schedule
        backend = choose_backend(
            placed.arena,
            self._layout.layers,
            max_context=sizes.max_model_len,
            hot=placed.hot,
            drawn=self._simulated.selection,
            kernels=self._kernels,
            waits=False,
        )
        if (recorder := self._simulated.recorder) is not None:
            assert isinstance(backend, GatherBackend | SparseBackend)
            backend.recorder = recorder
        make_runner = PlacingRunner if self._simulated.places_prompts else ModelRunner
        # Another engine may have had the same model guess.
        guesses = placed.hot is not None and self._options.memory.row_prefetch == 2
        bind_guesses(self._model, schedule.max_num_seqs if guesses else None)
        runner = make_runner(
            self._model,
            placed.arena,
            backend,
            max_num_seqs=schedule.max_num_seqs,
            num_lanes=current().layout.dp,
            hot=placed.hot,
            states=placed.states,
            kv_layers=self._layout.kv_layers,
        )
        compiles = self._device.type == "cuda" and not self._options.runtime.eager
        if compiles:
            with times.phase("compile the layers"):
                runner.compile(scratch_block=placed.scratch_block)
        elif not self._options.runtime.eager and current().size == 1:
            with times.phase("compile the layers"):
                runner.compile_rows(self._layout, placed.scratch_block)
        with times.phase("attention kernels"):
            # Ranks that wait for their kernels at other times would record at other times.
            runner.load_kernels(waits=not self._defers or current().size > 1)
        if compiles and (experts is None or experts.can_be_recorded):
            with times.phase("record steps"):
                runner.record(
                    max_num_tokens=schedule.max_num_batched_tokens,
                    max_context_blocks=-(-sizes.max_model_len // sizes.block_size),
                    scratch_block=placed.scratch_block,
                    before_cut=experts.join if experts is not None else None,
                    defers=self._defers,
                )
        return runner

    def try_steps(self, placed: Placed, runner: ModelRunner) -> list[tuple[int, float]]:
        """Tokens and seconds of steps that are run to take their time; see `time_prompts`."""
        most_tokens = self._schedule.max_num_batched_tokens
        return time_prompts(placed.sizes, runner, most_tokens)

    def facts(self, placed: Placed) -> dict[str, str]:
        """What has to be the same on all ranks."""
        sizes = placed.sizes
        return {
            "weights": self._loaded.fingerprint,
            "KV of a layer": str(self._layout.cache_specs),
            "blocks": f"{sizes.num_blocks} of {sizes.block_bytes} B",
            "states": str(sizes.states),
            "host slots": str(sizes.host_slots),
            "experts on the device": str(placed.experts and placed.experts.num_slots),
        }

    def _link_note(self) -> str:
        """What it costs that GPUs have no NVLink; empty where they have, and on a CPU."""
        config = self._model.config.get_text_config()
        if self._device.type != "cuda":
            return ""
        return Wire(likely_hardware(self._device), CALIBRATIONS["hotset"]).slow_note(
            current().size,
            self._options.schedule.max_num_seqs,
            (config.num_hidden_layers, config.hidden_size),
            has_peers=has_peers(),
        )

    def meter(self, sizes: Sizes) -> Meter:
        """Of what this rank has of the memory."""
        kv_bytes = sizes.host_slots * slot_bytes_for(sizes.block_bytes)
        expert_bytes = 0 if sizes.experts is None else sizes.experts.host_bytes
        return Meter(self._device, kv_bytes + expert_bytes, sizes.disk_bytes)

    @property
    def disk_path(self) -> Path:
        """The folder of this rank's part of the disk tier."""
        default = Path(platformdirs.user_cache_dir("hotset")) / "kv"
        folder = self._options.memory.disk_path or default
        rank, size = current().rank, current().size
        return folder if size == 1 else folder / f"rank-{rank}-of-{size}"


def _of_lane(schedule: ScheduleOptions, num_lanes: int) -> ScheduleOptions:
    """The part of one lane of what all have together."""

    def part(number: int) -> int:
        return -(-number // num_lanes)

    most_mixed = schedule.max_mixed_tokens
    return replace(
        schedule,
        max_num_seqs=part(schedule.max_num_seqs),
        max_num_batched_tokens=part(schedule.max_num_batched_tokens),
        max_mixed_tokens=None if most_mixed is None else part(most_mixed),
    )
