"""What each part of an engine gets of the memory, before any of it is taken. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from hotset.cost.expert_sizes import ExpertSizes, size_experts, with_disk
from hotset.cost.expert_split import KVMemory, least_bytes
from hotset.cost.slot_bytes import SlotBytes
from hotset.cost.tuning import TUNINGS
from hotset.engine.hot_sizing import HotSizes, solve_hot_sizes
from hotset.engine.memory_split import (
    MovingSplit,
    SolvedSplit,
    expected_load,
    split_memory,
)
from hotset.engine.model_sizes import ModelSizes
from hotset.engine.state_sizing import StateSizes, solve_state_sizes
from hotset.errors import ConfigError
from hotset.expert_options import ExpertBudget, HostedExperts, SplitMemory
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import capacity_bytes_for, payloads_within
from hotset.options import Options
from hotset.units import GIB, gib_text, round_up_gib

# Host slots that tiers below a device without a host tier need, to pass payloads through.
_STAGING_SLOTS = 64
_REPORTED_CONTEXTS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True, slots=True)
class FreeBytes:
    """Memory that is free with the model loaded; on a CPU both are the same memory."""

    device: int
    host: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What goes where. Made by `solve_sizes`.

    Attributes:
        weights_bytes: without experts that are in slots.
        workspace_bytes: an estimate of what the largest step takes beside weights and KV.
        num_blocks: KV blocks that the device has addresses for.
        first_block: the first of them that no expert slot has the memory of.
        host_slots: payloads in host memory; more than `host_gib` asks for only to stage a disk or
            a store.
        disk_bytes: size bound of the disk tier.
        max_model_len: longest context one request can have.
        max_mixed_tokens: most tokens of a step of prompts beside decodes.
        experts: where they are; None where they stay as they were loaded.
        moving: how the split between experts and KV moves; None where it stays.
        split_report: what to say of the split at start; empty where there is none.
        hot: what hot requests get; None where none may turn hot.
        states: slots for state beside KV; None where the model keeps none.
    """

    weights_bytes: int
    workspace_bytes: int
    block_bytes: int
    block_size: int
    num_blocks: int
    first_block: int
    host_slots: int
    disk_bytes: int
    max_model_len: int
    max_mixed_tokens: int
    experts: ExpertSizes | None = None
    moving: MovingSplit | None = None
    split_report: str = ""
    hot: HotSizes | None = None
    states: StateSizes | None = None

    @property
    def device_blocks(self) -> int:
        """KV blocks in the hot tier."""
        return self.num_blocks - self.first_block

    @property
    def expert_bytes(self) -> int:
        """Of slots and staging buffers of experts that are in host memory."""
        is_hosted = self.experts is not None and not self.experts.are_resident
        return self.experts.device_bytes if self.experts is not None and is_hosted else 0

    def report(self, *, device: str, disk_path: Path | None) -> str:
        """The table shown at start."""
        slot_bytes = slot_bytes_for(self.block_bytes)
        disk_slots = payloads_within(self.disk_bytes, slot_bytes)
        rows: list[tuple[str, str, int, int]] = [
            ("weights", device, self.weights_bytes, 0),
            ("workspace", device, self.workspace_bytes, 0),
            ("KV, hot tier", device, self.device_blocks * self.block_bytes, self.device_blocks),
        ]
        if self.states is not None:
            rows.append(("state", device, self.states.num_bytes, 0))
        if self.expert_bytes:
            rows.insert(1, ("expert slots", device, self.expert_bytes, 0))
        if self.host_slots:
            rows.append(("KV, host tier", "host", self.host_slots * slot_bytes, self.host_slots))
        if self.disk_bytes:
            rows.append(("KV, disk tier", str(disk_path), disk_slots * slot_bytes, disk_slots))
        lines = [f"{'what':<16}{'GiB':>9}{'blocks':>10}{'tokens':>12}  where"]
        for what, where, num_bytes, blocks in rows:
            counts = f"{blocks:>10}{blocks * self.block_size:>12}" if blocks else " " * 22
            lines.append(f"{what:<16}{num_bytes / GIB:>9.3f}{counts}  {where}")
        users = []
        # Payloads in host memory are on the disk too.
        below = max(self.host_slots, disk_slots)
        for context in (*_REPORTED_CONTEXTS, self.max_model_len):
            if context <= self.max_model_len:
                blocks = -(-context // self.block_size)
                hot, in_all = self.device_blocks // blocks, (self.device_blocks + below) // blocks
                if self.states is not None:
                    hot = min(hot, self.states.num_seqs)
                    in_all = hot + below // (blocks + self.states.num_payloads)
                users.append(
                    f"{context} tokens: {hot} hot"
                    + (f", {in_all} in all tiers" if self.host_slots else "")
                )
        lines.append("users of a context of " + "; ".join(dict.fromkeys(users)))
        if self.states is not None:
            lines.append(self.states.report(self.host_slots))
        if self.hot is not None:
            lines.append(
                f"hot requests: {self.hot.num_slots} tokens per layer on the device, the others in "
                "host memory, while more requests wait"
            )
        return "\n".join(lines)


def solve_sizes(options: Options, model: ModelSizes, free: FreeBytes) -> Sizes:
    """Turn what was asked into the size of each part.

    Args:
        options: the user's.
        model: loaded; its experts may still be elsewhere than they are to be.
        free: with the model loaded; to this rank, where there are several.

    Raises:
        ConfigError: a size that cannot work, with the smallest or largest one that can; or an
            option without effect for this model.
    """
    return _Solver(options, model, free).solve()


class _Solver:
    """See `solve_sizes`."""

    def __init__(self, options: Options, model: ModelSizes, free: FreeBytes) -> None:
        self.memory, self.asked, self.schedule = options.memory, options.experts, options.schedule
        self.model, self.free = model, free
        self.layout = options.layout.spread
        self.num_ranks = self.layout.gpus
        # What the user gives to KV and workspace, weights or experts, by its name.
        self.given = "hot_gib" if self.memory.total_gib is None else "total_gib"
        self.given_gib: float | None = getattr(self.memory, self.given)
        # The longest context asked for, and KV blocks that one request needs: for that, or where it
        # is the model's own for 256 tokens.
        self.max_len = min(self.schedule.max_model_len or model.max_len, model.max_len)
        few_tokens = min(self.schedule.max_model_len or 256, model.max_len)
        self.fewest_blocks = max(2, -(-few_tokens // model.block_size))

    def solve(self) -> Sizes:
        hot = self._hot_sizes()
        if hot is not None:  # its tables are in use with every step
            tables = hot.table_bytes(self.max_len)
            self.model = replace(self.model, workspace_bytes=self.model.workspace_bytes + tables)
        memory, model, experts = self.memory, self.model, None
        if isinstance(self.asked, HostedExperts):
            experts = size_experts(
                self.asked, model.slots, model.why_not_hosted, device=model.device
            )
        hot_bytes, split = self._hot_bytes(experts), None
        states = self._state_sizes(hot_bytes, self._free_beside(experts).device)
        self.state_bytes = 0 if states is None else states.num_bytes
        if hot_bytes is not None:
            hot_bytes -= self.state_bytes
        if isinstance(self.asked, SplitMemory) and model.slots is not None:
            split = self._split(self.asked, model.slots, hot_bytes)
            hot_bytes, experts = split.kv_bytes, split.experts
        free = self._free_beside(experts)
        kv_bytes = self._kv_bytes(hot_bytes, free.device)
        self._check_fits(experts, kv_bytes, free.device)
        num_blocks = self._num_blocks(kv_bytes)
        on_host = kv_bytes + self.state_bytes if model.device == "cpu" else 0
        host_slots = self._host_slots(free.host - on_host)
        max_len = min(self.max_len, num_blocks * model.block_size)
        first_block, moving = 0, None if split is None else split.moving
        if moving is not None and experts is not None:
            region = moving.region
            num_blocks, first_block = region.num_blocks, region.first_block(experts.num_slots)
            max_len = min(max_len, region.num_kv_blocks(region.most_slots) * model.block_size)
        return Sizes(
            weights_bytes=self._weights_bytes(experts),
            workspace_bytes=model.workspace_bytes,
            block_bytes=model.block_bytes,
            block_size=model.block_size,
            num_blocks=num_blocks,
            first_block=first_block,
            host_slots=host_slots,
            disk_bytes=self._part(memory.disk_gib),
            max_model_len=max_len,
            max_mixed_tokens=self._mixed_tokens(
                is_hosted=experts is not None and not experts.are_resident
            ),
            experts=experts,
            moving=moving,
            split_report="" if split is None else split.report,
            hot=hot,
            states=states,
        )

    def _state_sizes(self, hot_bytes: int | None, free_bytes: int) -> StateSizes | None:
        """What state gets of the memory for KV; at most half where experts share it."""
        model, schedule = self.model, self.schedule
        if not model.state_bytes:
            return None
        most_seqs, fewest_blocks = schedule.max_num_seqs, self.fewest_blocks
        if hot_bytes is None:
            hot_bytes = self._share(free_bytes - model.workspace_bytes)
        most_bytes = hot_bytes
        if isinstance(self.asked, SplitMemory) and model.slots is not None:
            load = expected_load(self.asked, schedule, self.max_len)
            slots, _ = with_disk(self.asked, model.slots)
            kv = KVMemory(model.block_bytes, model.block_size, 0)
            fewest_slots = max(slots.fewest, self.asked.expert_prefetch)
            most_seqs, most_bytes = int(load.users), hot_bytes // 2
            hot_bytes -= least_bytes(slots, kv, fewest_slots)
            fewest_blocks = max(fewest_blocks, kv.blocks_of(load.context))
        return solve_state_sizes(
            model.state_bytes,
            hot_bytes,
            most_bytes=most_bytes,
            block_bytes=model.block_bytes,
            block_size=model.block_size,
            fewest_blocks=fewest_blocks,
            most_seqs=most_seqs,
            max_len=self.max_len,
            memory=self.memory,
            given=self.given,
        )

    def _part(self, gib: float) -> int:
        """This rank's bytes of host memory or disk that all ranks share."""
        return int(gib * GIB) // self.num_ranks

    def _share(self, free_bytes: int) -> int:
        """What KV gets at most where the user does not say."""
        return int(free_bytes * TUNINGS[self.model.device].memory_share)

    def _hot_sizes(self) -> HotSizes | None:
        """What hot requests get."""
        model, slot_bytes = self.model, slot_bytes_for(self.model.block_bytes)
        hot = solve_hot_sizes(
            self.memory.hot_tokens,
            model.sparse,
            why_not=model.why_not_hot,
            block_size=model.block_size,
            max_num_seqs=self.schedule.max_num_seqs,
            max_len=self.max_len,
            host_slots=self._part(self.memory.host_gib) // slot_bytes,
            slot_bytes=slot_bytes,
        )
        if hot is None and self.schedule.tpot_ms is not None:
            raise ConfigError(
                f"tpot_ms is {self.schedule.tpot_ms}, but no request may be hot here; leave "
                "tpot_ms out, or give host_gib to a model with sparse attention"
            )
        return hot

    def _hot_bytes(self, experts: ExpertSizes | None) -> int | None:
        """What the user gives to KV, and to experts where these share it; None: what is left."""
        model = self.model
        if self.given_gib is None:
            return None
        given_bytes = int(self.given_gib * GIB)
        if self.given == "hot_gib":
            return given_bytes
        taken = model.dense_bytes + model.workspace_bytes
        if model.slots is None:
            taken += model.expert_bytes  # in its own way, so they all stay
        elif isinstance(self.asked, ExpertBudget):
            taken += int(self.asked.expert_gib * GIB)
        elif experts is not None:
            taken += experts.slots(experts.num_slots)
        if given_bytes <= taken:
            raise ConfigError(
                f"total_gib is {self.given_gib}, but what is not split takes {gib_text(taken)}: "
                f"weights without experts {gib_text(model.dense_bytes)}, workspace "
                f"{gib_text(model.workspace_bytes)}; give more"
            )
        return given_bytes - taken

    def _split(self, asked: SplitMemory, slots: SlotBytes, hot_bytes: int | None) -> SolvedSplit:
        model, schedule = self.model, self.schedule
        assert model.rated is not None and hot_bytes is not None
        if asked.move_split and model.has_index_keys:
            raise ConfigError(
                "move_split lends whole blocks, and those of a model with sparse attention are in "
                "two parts, latents and index keys; leave move_split out"
            )
        load = expected_load(asked, schedule, self.max_len)
        kv = KVMemory(model.block_bytes, model.block_size, self.fewest_blocks)
        return split_memory(
            asked,
            slots,
            model.rated,
            load,
            replace(kv, fewest_blocks=max(self.fewest_blocks, kv.blocks_of(load.context))),
            hot_bytes=hot_bytes,
            given=f"{self.given} {self.given_gib}",
            has_longest=schedule.max_model_len is not None,
            max_step_tokens=self._mixed_tokens(is_hosted=True),
            device=model.device,
        )

    def _free_beside(self, experts: ExpertSizes | None) -> FreeBytes:
        """What is free once experts are where they are to be, from where they were loaded."""
        model, free = self.model, self.free
        if experts is None:
            return free
        device = free.device + model.device_expert_bytes - experts.device_bytes
        # The host copy is made of weights; an engine before may have made it.
        host = free.host + model.expert_bytes - model.device_expert_bytes
        if model.expert_bytes:
            host -= experts.host_bytes
        if model.device == "cpu":
            if not model.expert_bytes and experts.are_resident:
                # The host copy becomes the weights, which may be wider.
                slots = experts.slots
                kept = slots.num_layers * slots.num_experts * slots.cold_bytes
                wider = experts.device_bytes - kept
                return FreeBytes(free.device - wider, free.host - wider)
            one = device + host - free.host
            return FreeBytes(one, one)
        return FreeBytes(device, host)

    def _kv_bytes(self, hot_bytes: int | None, free_bytes: int) -> int:
        """What KV gets of the device: as asked, or a share of what is free."""
        model, schedule = self.model, self.schedule
        free_bytes -= self.state_bytes
        if model.workspace_bytes >= free_bytes:
            raise ConfigError(
                f"a step of {schedule.max_num_batched_tokens} tokens and {schedule.max_num_seqs} "
                f"requests may take {model.workspace_bytes / GIB:.3f} GiB beside weights and KV, "
                f"and {max(0, free_bytes) / GIB:.3f} GiB are free on the {model.device}; give less "
                "max_num_batched_tokens or max_num_seqs, or a smaller model"
            )
        if hot_bytes is not None:
            return hot_bytes
        most_blocks = schedule.max_num_seqs * -(-self.max_len // model.block_size)
        share = self._share(free_bytes - model.workspace_bytes)
        return min(share, most_blocks * model.block_bytes)

    def _check_fits(self, experts: ExpertSizes | None, kv_bytes: int, free_bytes: int) -> None:
        """Raise ConfigError where there is less memory on the device than KV is to have."""
        model = self.model
        free_bytes -= model.workspace_bytes + self.state_bytes
        if kv_bytes <= free_bytes:
            return
        workspace = f"workspace ({gib_text(model.workspace_bytes)})"
        if self.state_bytes:
            workspace = f"state ({gib_text(self.state_bytes)}) and {workspace}"
        expert_bytes = 0 if experts is None else experts.device_bytes
        if expert_bytes and isinstance(self.asked, SplitMemory):
            free = gib_text(max(0, free_bytes + expert_bytes), up=False)
            raise ConfigError(
                f"{gib_text(kv_bytes + expert_bytes)} for KV and experts are more than the {free} "
                f"free on the {model.device} beside weights without experts "
                f"({gib_text(model.dense_bytes)}) and {workspace}; give less"
            )
        weights_bytes = model.dense_bytes + (
            model.expert_bytes if experts is None else expert_bytes
        )
        raise ConfigError(
            f"{self.given} {self.given_gib} asks for {gib_text(kv_bytes)} of KV, which is more "
            f"than the {gib_text(max(0, free_bytes), up=False)} free on the {model.device} beside "
            f"weights ({gib_text(weights_bytes)}) and {workspace}; give less, or leave "
            f"{self.given} out"
        )

    def _num_blocks(self, kv_bytes: int) -> int:
        block_bytes, needed = self.model.block_bytes, self.fewest_blocks
        if kv_bytes // block_bytes >= needed:
            return kv_bytes // block_bytes
        least_bytes = needed * block_bytes + self.state_bytes
        if (total_gib := self.memory.total_gib) is not None:
            least_bytes += int(total_gib * GIB) - kv_bytes
        raise ConfigError(
            f"the hot tier of {kv_bytes / GIB:.6f} GiB holds {kv_bytes // block_bytes} KV blocks "
            f"of {block_bytes} bytes, but one request needs {needed}; give {self.given} "
            f"{round_up_gib(least_bytes)} or more"
        )

    def _host_slots(self, free_bytes: int) -> int:
        """Payloads in host memory, for the host tier and to stage a disk."""
        memory, slot_bytes = self.memory, slot_bytes_for(self.model.block_bytes)
        host_slots = self._part(memory.host_gib) // slot_bytes
        if memory.host_gib > 0 and host_slots < 1:
            raise ConfigError(
                f"host_gib {memory.host_gib} holds no KV block of {slot_bytes} bytes; give "
                f"{round_up_gib(self.num_ranks * slot_bytes)} or more, or 0 for no host tier"
            )
        if memory.disk_gib > 0 or memory.remote or memory.peer_url:
            host_slots = max(host_slots, _STAGING_SLOTS)
        if memory.disk_gib > 0 and payloads_within(self._part(memory.disk_gib), slot_bytes) < 1:
            least = capacity_bytes_for(1, slot_bytes)
            raise ConfigError(
                f"disk_gib {memory.disk_gib} holds no KV block of {slot_bytes} bytes beside "
                f"its index; give {round_up_gib(self.num_ranks * least)} or more, "
                "or 0 for no disk tier"
            )
        if host_slots * slot_bytes > free_bytes:
            raise ConfigError(
                f"the host tier would take {host_slots * slot_bytes / GIB:.3f} GiB but "
                f"{max(0, free_bytes) / GIB:.3f} GiB of host memory are free; give less host_gib"
            )
        return host_slots

    def _weights_bytes(self, experts: ExpertSizes | None) -> int:
        if experts is None:
            return self.model.dense_bytes + self.model.expert_bytes
        return self.model.dense_bytes + (experts.device_bytes if experts.are_resident else 0)

    def _mixed_tokens(self, *, is_hosted: bool) -> int:
        """Most tokens of a step of prompts beside decodes, with experts in host memory or none."""
        model, schedule, tuning = self.model, self.schedule, TUNINGS[self.model.device]
        if schedule.max_mixed_tokens is not None:
            return schedule.max_mixed_tokens
        if model.device == "cpu":
            return tuning.mixed_tokens
        if schedule.rotation_s is not None:
            # First tokens are to come soon: the fewer steps prompts take, the fewer decodes beside.
            return schedule.max_num_batched_tokens
        if not model.num_experts:
            return tuning.mixed_tokens
        if is_hosted:
            # A step with prompts brings nearly all missing experts over the link, which takes
            # longer than to compute any tokens: the more of them share it, the better, decodes too.
            return schedule.max_num_batched_tokens
        # Experts of all ranks compute the tokens of all lanes.
        num_experts = model.num_experts * self.layout.ep
        rows = tuning.mixed_rows_per_expert * num_experts // model.top_k // self.layout.dp
        return min(max(tuning.mixed_tokens, rows), schedule.max_num_batched_tokens)
