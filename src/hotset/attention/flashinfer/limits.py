"""How much memory FlashInfer's attention takes, and how many sequences that holds.

Imports no torch.
"""

from hotset.cost.workspace import KERNEL_WORKSPACE_BYTES

_TILE_ROWS = (16, 64, 128)


def most_recorded_seqs(num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """The most sequences whose partial results fit into a kernel's workspace in a recorded step.

    By `PrefillPlan` of FlashInfer's `scheduler.cuh`: a partial result is float32 numbers and their
    sum per head and row of a tile. There is one tile per sequence, and one per `tile` query rows.
    """
    group = num_heads // num_kv_heads
    tile = next(rows for rows in _TILE_ROWS if rows >= min(group, _TILE_ROWS[-1]))
    row_bytes = 4 * num_heads * (head_dim + 1)
    return KERNEL_WORKSPACE_BYTES // (row_bytes * (tile + group))


def most_widened_blocks(block_values: int, itemsize: int, num_bytes: int) -> int:
    """The most blocks that a copy of `num_bytes` holds, at least one.

    Args:
        block_values: numbers of a block in the widest layer.
        itemsize: bytes of a number.
        num_bytes: of the copy.
    """
    return max(1, num_bytes // (block_values * itemsize))
