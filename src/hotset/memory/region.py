"""Where experts and KV are in the memory that they share, and the boundary between them.

Imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SharedRegion:
    """Device memory that expert slots take from its start and KV blocks from its end.

    Slot s of all L layers is one unit, at `s * unit_bytes`, and block b is at `b * block_bytes`, so
    that neither changes its address when the boundary moves: what is recorded holds addresses.
    With S slots in use the first block that is free of them is `first_block(S)`. One block more, at
    the end, is for rows of padding.

    Attributes:
        unit_bytes: of a slot over all layers.
        block_bytes: of KV.
        num_blocks: that fit where there are no slots.
        fewest_slots: that stay in use, for which steps are recorded and staging buffers have room.
        most_slots: that can be in use.
    """

    unit_bytes: int
    block_bytes: int
    num_blocks: int
    fewest_slots: int
    most_slots: int

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return (self.num_blocks + 1) * self.block_bytes

    def first_block(self, num_slots: int) -> int:
        """The first block that `num_slots` slots leave free."""
        return -(-num_slots * self.unit_bytes // self.block_bytes)

    def num_kv_blocks(self, num_slots: int) -> int:
        """Blocks for KV beside `num_slots` slots."""
        return self.num_blocks - self.first_block(num_slots)
