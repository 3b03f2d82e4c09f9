"""Coalescing copies. Imports no torch."""

from collections.abc import Sequence


def merge_runs(
    pairs: Sequence[tuple[int, int]], *, slots_per_chunk: int | None = None
) -> list[tuple[int, int, int]]:
    """Merge (block, slot) pairs into (block, slot, count) runs where both go up by one.

    No run goes on past a slot that is a multiple of `slots_per_chunk`.
    """
    merged: list[tuple[int, int, int]] = []
    for block, slot in sorted(pairs):
        if merged and (slots_per_chunk is None or slot % slots_per_chunk):
            first_block, first_slot, count = merged[-1]
            if block == first_block + count and slot == first_slot + count:
                merged[-1] = (first_block, first_slot, count + 1)
                continue
        merged.append((block, slot, 1))
    return merged
