"""Coalescing copies."""

from collections.abc import Sequence


def merge_runs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Merge (block, slot) pairs into (block, slot, count) runs where both go up by one."""
    merged: list[tuple[int, int, int]] = []
    for block, slot in sorted(pairs):
        if merged:
            first_block, first_slot, count = merged[-1]
            if block == first_block + count and slot == first_slot + count:
                merged[-1] = (first_block, first_slot, count + 1)
                continue
        merged.append((block, slot, 1))
    return merged
