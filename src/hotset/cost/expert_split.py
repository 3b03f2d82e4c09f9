"""The split of device memory between experts and KV: every number of slots is tried.

More slots move fewer bytes in each step; more KV lets more requests share what a step moves. Where
requests queue, KV wins until all of them run; with few requests slots win.
"""

from dataclasses import dataclass
from typing import Protocol

from hotset.cost.expert_steps import ExpertCost, Load, Served


class SlotMemory(Protocol):
    """What slots take on the device over all layers, staging buffers included."""

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        ...

    def __call__(self, num_slots: int) -> int:
        """Bytes of `num_slots` slots per layer."""
        ...


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


def solve_split(
    total_bytes: int,
    cost: ExpertCost,
    slots: SlotMemory,
    kv: KVMemory,
    load: Load,
    *,
    target: str,
    max_step_tokens: float,
    fewest_slots: int,
    most_slots: int | None = None,
) -> Split | None:
    """The best split of `total_bytes`; None where not even the fewest slots and blocks fit.

    Args:
        total_bytes: for slots and KV together.
        cost: of steps.
        slots: what they take.
        kv: what a block takes.
        load: what is expected.
        target: `throughput`, the most tokens/s of `load`; or `latency`, the shortest decode step
            with as many of its users at once as can be. Of equal ones the most slots.
        max_step_tokens: of prompts in a step.
        fewest_slots: of a layer, that can work.
        most_slots: likewise; None is all its experts.
    """
    options = []
    most_slots = slots.num_experts if most_slots is None else most_slots
    for num_slots in range(fewest_slots, most_slots + 1):
        expert_bytes = slots(num_slots)
        num_blocks = (total_bytes - expert_bytes) // kv.block_bytes
        if num_blocks < kv.fewest_blocks:
            continue
        served = cost.serve(
            num_slots,
            load,
            kv_tokens=kv.capacity(num_blocks, load),
            max_step_tokens=max_step_tokens,
        )
        options.append(Split(num_slots, expert_bytes, total_bytes - expert_bytes, served))

    def throughput(split: Split) -> tuple[float, ...]:
        return (split.served.output_tokens_per_s, split.num_slots)

    def latency(split: Split) -> tuple[float, ...]:
        served = split.served
        return (served.at_once, -served.decode_step.seconds, split.num_slots)

    return max(options, key=latency if target == "latency" else throughput, default=None)


@dataclass(frozen=True, slots=True)
class Splitter:
    """`solve_split` for one load after another."""

    total_bytes: int
    cost: ExpertCost
    slots: SlotMemory
    kv: KVMemory
    target: str
    max_step_tokens: float
    fewest_slots: int
    most_slots: int

    def solve(self, load: Load, num_slots: int | None = None) -> Split | None:
        """The best split for `load`; or that of `num_slots`, and what it serves."""
        return solve_split(
            self.total_bytes,
            self.cost,
            self.slots,
            self.kv,
            load,
            target=self.target,
            max_step_tokens=self.max_step_tokens,
            fewest_slots=self.fewest_slots if num_slots is None else num_slots,
            most_slots=self.most_slots if num_slots is None else num_slots,
        )


def least_bytes(slots: SlotMemory, kv: KVMemory, fewest_slots: int) -> int:
    """The fewest bytes that `solve_split` can split."""
    sizes = (slots(n) for n in range(fewest_slots, slots.num_experts + 1))
    return min(sizes) + kv.fewest_blocks * kv.block_bytes
