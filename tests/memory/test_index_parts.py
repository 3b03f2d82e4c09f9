import torch

from hotset.cost.cache_spec import KEYS_ALONE, KeysValues, Latent
from hotset.kv.index_blocks import IndexBlocks
from hotset.kv.pool import BlockPool
from hotset.memory.arena import DeviceArena

LATENT = Latent(4, 2, KeysValues(2, 8, 8))


def test_index_blocks_lie_in_the_rows_of_their_block_and_in_no_other() -> None:
    arena = DeviceArena(
        [LATENT] * 3,
        num_blocks=4,
        block_size=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
        index_dims=[5, 0, 0],
    )
    pool = BlockPool(3)
    blocks = IndexBlocks(pool, first=4, row_bytes=3 * 6, index_bytes=5)
    assert pool.allocate(1) == [0]  # and block 3 is none of the pool's
    while blocks.can_take:
        arena.index_keys[0][blocks.take() ^ KEYS_ALONE] = 7
    for layer in arena.layers:
        assert not layer[[0, 3]].any()
    assert not arena.index_keys[0][[0, 3]].any()  # block 0's own, and block 3's
    assert all((layer[1:3] == 7).any() for layer in arena.layers)


def test_copies_to_index_blocks_take_index_keys_alone_and_their_order_counts() -> None:
    arena = DeviceArena(
        [LATENT, LATENT],
        num_blocks=3,
        block_size=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
        index_dims=[3, 1],
    )
    for block in range(3):
        arena.layers[0][block] = arena.layers[1][block] = 10 + block
        arena.index_keys[0][block] = arena.index_keys[1][block] = 20 + block
    index_block = 3 + 2 * 12 // 4  # the first in the rows of block 2
    numbers = index_block, index_block + 1
    copies = [(0, number | KEYS_ALONE) for number in numbers]
    arena.copy_blocks([(2, 1), *copies, (1, 0)])
    assert [float(arena.index_keys[i][index_block, 0, 0]) for i in (0, 1)] == [20, 20]
    assert (arena.index_keys[1][index_block + 1] == 20).all()
    assert [float(arena.index_keys[0][i, 0, 0]) for i in (0, 1, 2)] == [22, 22, 22]
    assert (arena.layers[1][:2] == 12).all() and (arena.layers[0][:2] == 12).all()


def test_without_index_keys_a_block_is_one_run() -> None:
    arena = DeviceArena(
        [KeysValues(2, 4, 4)],
        num_blocks=3,
        block_size=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    [(address, place, num_bytes)] = arena.runs(1)
    assert place == 0
    assert num_bytes == arena.block_bytes == 2 * 2 * 2 * 4 * 4
    assert address == arena.memory.data_ptr() + num_bytes
