"""What an engine sets up for requests that may turn hot."""

import torch

from hotset.attention.hot_rows import HotRows
from hotset.attention.seat_tables import SeatTables
from hotset.engine.hot_sizing import HotSizes
from hotset.engine.open_tiers import HostMemory
from hotset.engine.sizing import Sizes
from hotset.kv.index_blocks import IndexBlocks
from hotset.kv.pool import BlockPool
from hotset.kv.seats import Seats
from hotset.memory.arena import DeviceArena, row_steps


def place_hot_rows(
    hot: HotSizes,
    sizes: Sizes,
    arena: DeviceArena,
    host: HostMemory,
    *,
    fetches_ahead: bool,
) -> HotRows:
    """Tables on the device, beside host memory: steps that are recorded read both.

    Raises:
        torch.OutOfMemoryError: the tables do not fit there.
    """
    rows_per_block, _ = row_steps(arena.layers[0])
    tables = SeatTables(
        num_seats=hot.num_seats,
        num_slots=hot.num_slots,
        rows_per_token=[len(group) for group in arena.groups],
        max_num_tokens=sizes.max_model_len,
        block_size=sizes.block_size,
        rows_per_block=rows_per_block,
        device=arena.storage.device,
    )
    slots = torch.from_numpy(host.arena.slots)
    return HotRows(tables, arena, slots, fetches_ahead=fetches_ahead)


def seats_in(pool: BlockPool, hot: HotSizes, sizes: Sizes) -> tuple[Seats, IndexBlocks]:
    """The books of hot requests: who has which seat, and index blocks carved from the pool."""
    seats = Seats(num_seats=hot.num_seats, num_slots=hot.num_slots, block_size=sizes.block_size)
    index_blocks = IndexBlocks(
        pool,
        first=sizes.num_blocks + 1,  # after the scratch block
        row_bytes=hot.sparse.row_bytes,
        index_bytes=hot.sparse.index_bytes,
    )
    return seats, index_blocks
