"""What each part of an engine gets of the memory, before any of it is taken. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from hotset.cost.expert_sizes import ExpertSizes
from hotset.engine.hot_sizing import HotSizes
from hotset.engine.memory_split import MovingSplit
from hotset.engine.state_sizing import StateSizes
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import payloads_within
from hotset.units import GIB

_REPORTED_CONTEXTS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What goes where. Made by `sizing.solve_sizes`.

    Attributes:
        weights_bytes: without experts that are in slots.
        workspace_bytes: an estimate of what the largest step takes beside weights and KV.
        num_blocks: KV blocks that the device has addresses for.
        first_block: the first of them that no expert slot has the memory of.
        host_slots: payloads in host memory; more than `host_gib` asks for only to stage a disk.
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
        total_blocks = self.device_blocks + max(self.host_slots, disk_slots)
        for context in (*_REPORTED_CONTEXTS, self.max_model_len):
            if context <= self.max_model_len:
                blocks = -(-context // self.block_size)
                hot = self.device_blocks // blocks
                if self.states is not None:
                    hot = min(hot, self.states.num_seqs)
                users.append(
                    f"{context} tokens: {hot} hot"
                    + (f", {total_blocks // blocks} in all tiers" if self.host_slots else "")
                )
        lines.append("users of a context of " + "; ".join(dict.fromkeys(users)))
        if self.states is not None:
            lines.append(
                f"state: {self.states.num_seqs} requests at once, and {self.states.num_kept} more "
                f"states that are kept, {self.states.slot_bytes:,} B each"
            )
        if self.hot is not None:
            lines.append(
                f"hot requests: {self.hot.num_slots} tokens per layer on the device, the others in "
                "host memory, while more requests wait"
            )
        return "\n".join(lines)
