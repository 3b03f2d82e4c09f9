"""How many slots the state of requests gets of the memory for KV. Imports no torch."""

from dataclasses import dataclass

from hotset.errors import ConfigError
from hotset.option_groups import MemoryOptions
from hotset.sequence import PADDING_SLOT
from hotset.units import GIB, gib_text, round_up_gib

# What a request is taken to hold on average where its longest context is more.
_USUAL_TOKENS = 1280
# Requests per state that is kept, and the fewest states kept.
_SEQS_PER_KEPT, _FEWEST_KEPT = 4, 8
_NUM_RESERVED = PADDING_SLOT + 1


@dataclass(frozen=True, slots=True)
class StateSizes:
    """What the state of requests takes beside KV.

    Attributes:
        num_seqs: requests that are to run at once.
        num_kept: slots beside for states that others may go on from.
        slot_bytes: of the state of one.
        num_payloads: that one takes in slower tiers.
    """

    num_seqs: int
    num_kept: int
    slot_bytes: int
    num_payloads: int

    @property
    def num_slots(self) -> int:
        """For requests, and what they keep."""
        return self.num_seqs + self.num_kept

    @property
    def num_all_slots(self) -> int:
        """With those that no request gets."""
        return self.num_slots + _NUM_RESERVED

    @property
    def num_bytes(self) -> int:
        """On the device."""
        return self.num_all_slots * self.slot_bytes

    def go_down(self, host_slots: int) -> bool:
        """Whether states go to slower tiers: host memory has to hold two at once."""
        return host_slots >= 2 * self.num_payloads

    def report(self, host_slots: int) -> str:
        """The line shown at start."""
        line = (
            f"state: {self.num_seqs} requests at once, and {self.num_kept} more states that are "
            f"kept, {self.slot_bytes:,} B each"
        )
        if not host_slots:
            return line
        if self.go_down(host_slots):
            return f"{line}, {self.num_payloads} blocks each in host memory and on disk"
        return (
            f"{line}; none goes to host memory, which has {host_slots} blocks and takes states "
            f"from {2 * self.num_payloads} on"
        )


def solve_state_sizes(
    slot_bytes: int,
    hot_bytes: int,
    *,
    most_bytes: int,
    block_bytes: int,
    block_size: int,
    fewest_blocks: int,
    most_seqs: int,
    max_len: int,
    memory: MemoryOptions,
    given: str,
) -> StateSizes:
    """As many slots as requests of a usual length have KV beside, at most `most_seqs`.

    A quarter more, and at least some, are for states that are kept, as far as there is room.

    Args:
        slot_bytes: state of one request.
        hot_bytes: for KV and state.
        most_bytes: of these, the most for states beside that of one request.
        block_bytes: of a KV block.
        block_size: its tokens.
        fewest_blocks: that one request needs.
        most_seqs: requests of a step.
        max_len: longest context.
        memory: the user's options.
        given: the one that `hot_bytes` comes from.

    Raises:
        ConfigError: not one request has room.
    """
    least_bytes = (_NUM_RESERVED + 1) * slot_bytes + fewest_blocks * block_bytes
    if hot_bytes < least_bytes:
        raise ConfigError(
            f"the hot tier of {gib_text(max(0, hot_bytes), up=False)} has no room for one request: "
            f"its state takes {slot_bytes:,} bytes, in {_NUM_RESERVED + 1} slots, and its KV "
            f"{fewest_blocks * block_bytes:,}; give {given} "
            f"{round_up_gib(_asked_bytes(memory, hot_bytes) + least_bytes - hot_bytes)} or more"
        )
    usual = -(-min(max_len, _USUAL_TOKENS) // block_size) * block_bytes
    hot_bytes -= _NUM_RESERVED * slot_bytes
    for_kv = fewest_blocks * block_bytes
    each = slot_bytes + slot_bytes // _SEQS_PER_KEPT + usual
    most = most_bytes // slot_bytes - _NUM_RESERVED
    num_seqs = min(hot_bytes // each, (hot_bytes - for_kv) // slot_bytes, most, most_seqs)
    num_seqs = max(1, num_seqs)
    left = hot_bytes - num_seqs * slot_bytes - max(for_kv, num_seqs * usual)
    kept = max(_FEWEST_KEPT, num_seqs // _SEQS_PER_KEPT)
    room = max(0, min(left // slot_bytes, most - num_seqs))
    return StateSizes(num_seqs, min(kept, room), slot_bytes, -(-slot_bytes // block_bytes))


def _asked_bytes(memory: MemoryOptions, hot_bytes: int) -> int:
    """What the user gives to KV and all that it shares memory with."""
    return hot_bytes if memory.total_gib is None else int(memory.total_gib * GIB)
