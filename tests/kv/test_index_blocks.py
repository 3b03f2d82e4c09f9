import random

import pytest

from hotset.cost.cache_spec import KEYS_ALONE
from hotset.errors import OutOfBlocksError
from hotset.kv.index_blocks import IndexBlocks
from hotset.kv.pool import BlockPool

# Of a token in all layers: DeepSeek-V3.2 and GLM-5.2 in 16 bits, and odd ones.
WIDTHS = [(61 * 576, 61 * 128), (78 * 576, 21 * 128), (9, 2), (7, 7), (12, 5)]


@pytest.mark.parametrize(("row_bytes", "index_bytes"), WIDTHS)
def test_index_blocks_lie_within_the_rows_of_their_block_and_not_in_each_other(
    row_bytes: int, index_bytes: int
) -> None:
    pool = BlockPool(5)
    blocks = IndexBlocks(pool, first=6, row_bytes=row_bytes, index_bytes=index_bytes)
    taken = []
    while blocks.can_take:
        taken.append(blocks.take())
        blocks.check()
    assert len(set(taken)) == len(taken) >= 5 * blocks.fewest_per_block
    numbers = [block ^ KEYS_ALONE for block in taken]
    assert {number for number in numbers if number < 6} == set(range(5))  # their own index keys
    with pytest.raises(OutOfBlocksError):
        blocks.take()
    for number in numbers:  # the rows begin where index keys of six whole blocks end
        start, end = ((number - 6 + i) * index_bytes for i in range(2))
        assert number < 6 or start // row_bytes == (end - 1) // row_bytes < 5
    for block in random.Random(0).sample(taken, len(taken)):
        blocks.give_back(block)
        blocks.check()
    assert pool.num_available == 5 and blocks.num_used == 0


def test_a_block_goes_back_to_the_pool_once_none_of_it_is_in_use() -> None:
    pool = BlockPool(2)
    blocks = IndexBlocks(pool, first=3, row_bytes=9, index_bytes=3)
    first, second = blocks.take(), blocks.take()
    assert pool.num_available == 1
    blocks.give_back(first)
    assert pool.num_available == 1
    blocks.give_back(second)
    assert pool.num_available == 2


def test_an_index_block_given_back_twice_is_noticed() -> None:
    blocks = IndexBlocks(BlockPool(1), first=1, row_bytes=9, index_bytes=3)
    first, _ = blocks.take(), blocks.take()
    blocks.give_back(first)
    with pytest.raises(AssertionError, match="twice"):
        blocks.give_back(first)


def test_a_block_that_is_slots_keeps_its_index_keys_and_is_not_given_back_with_them() -> None:
    pool = BlockPool(2)
    blocks = IndexBlocks(pool, first=3, row_bytes=9, index_bytes=3)
    [slots] = pool.allocate(1)
    own = blocks.keep_own(slots)
    assert own == slots | KEYS_ALONE and blocks.num_used == 1
    carved = [blocks.take() for _ in range(4)]
    assert own not in carved and not blocks.can_take
    blocks.check()
    for block in (own, *carved):
        blocks.give_back(block)
        blocks.check()
    assert blocks.num_used == 0 and pool.num_available == 1  # the slots are held still
