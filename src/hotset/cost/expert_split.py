"""The split of device memory between experts and KV: every number of slots is tried.

More slots move fewer bytes in each step; more KV lets more requests share what a step moves. Where
requests queue, KV wins until all of them run; with few requests slots win.
"""

from dataclasses import dataclass

from hotset.cost.expert_steps import ExpertCost, Load, Served
from hotset.cost.slot_bytes import SlotBytes


@dataclass(frozen=True, slots=True)
class KVMemory:
    """KV by the block.

    Attributes:
        fewest_blocks: that the engine can work with.
    """

    block_bytes: int
    block_size: int
    fewest_blocks: int

    def blocks_of(self, tokens: float) -> int:
        """Blocks of a request with this many tokens."""
        return -int(-tokens // self.block_size)

    def capacity(self, num_blocks: int, load: Load) -> float:
        """Tokens of `load` that these blocks hold: a request's last block is seldom full."""
        return num_blocks / self.blocks_of(load.context) * load.context


@dataclass(frozen=True, slots=True)
class Split:
    """How memory is split, and what that serves.

    Attributes:
        num_slots: of each layer; all experts where nothing is left in host memory.
        expert_bytes: that they take, with staging buffers.
        kv_bytes: the rest.
        served: by `Load` as it was solved for.
    """

    num_slots: int
    expert_bytes: int
    kv_bytes: int
    served: Served


@dataclass(frozen=True, slots=True)
class Splitter:
    """Solves for the best split of memory, for one load after another.

    Attributes:
        total_bytes: for slots and KV together.
        cost: of steps.
        slots: what they take.
        kv: what a block takes.
        target: `throughput`, the most tokens/s of a load; or `latency`, the shortest decode step
            with as many of its users at once as can be. Of equal ones the most slots.
        max_step_tokens: of prompts in a step.
        fewest_slots: of a layer, that can work.
        most_slots: likewise.
    """

    total_bytes: int
    cost: ExpertCost
    slots: SlotBytes
    kv: KVMemory
    target: str
    max_step_tokens: float
    fewest_slots: int
    most_slots: int

    def solve(self, load: Load, num_slots: int | None = None) -> Split | None:
        """The best split for `load`; or that of `num_slots`, and what it serves.

        None where not even the fewest slots and blocks fit.
        """
        fewest, most = self.fewest_slots, self.most_slots
        tried = range(fewest, most + 1) if num_slots is None else [num_slots]
        splits = filter(None, (self._split(load, slots) for slots in tried))
        return max(splits, key=self._rank, default=None)

    def _split(self, load: Load, num_slots: int) -> Split | None:
        expert_bytes = self.slots(num_slots)
        num_blocks = (self.total_bytes - expert_bytes) // self.kv.block_bytes
        if num_blocks < self.kv.fewest_blocks:
            return None
        served = self.cost.serve(
            num_slots,
            load,
            kv_tokens=self.kv.capacity(num_blocks, load),
            max_step_tokens=self.max_step_tokens,
        )
        return Split(num_slots, expert_bytes, self.total_bytes - expert_bytes, served)

    def _rank(self, split: Split) -> tuple[float, ...]:
        served = split.served
        if self.target == "latency":
            return served.at_once, -served.decode_step.seconds, split.num_slots
        return served.output_tokens_per_s, split.num_slots


def least_bytes(slots: SlotBytes, kv: KVMemory, fewest_slots: int) -> int:
    """The fewest bytes that a `Splitter` can split."""
    sizes = (slots(n) for n in range(fewest_slots, slots.num_experts + 1))
    return min(sizes) + kv.fewest_blocks * kv.block_bytes
