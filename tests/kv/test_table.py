"""What sequences have of the pool, and lack."""

from schedulers import BLOCK, make_request

from hotset.kv.pool import BlockPool
from hotset.kv.table import BlockTables


def test_room_is_reserved_for_all_or_nothing() -> None:
    tables = BlockTables(BlockPool(3), BLOCK)
    request = make_request(list(range(20)))
    assert not tables.reserve(request, 13)
    assert request.kv.block_table == [] and tables.num_available == 3
    assert tables.reserve(request, 12)
    assert len(request.kv.block_table) == 3 and tables.num_available == 0
    assert tables.reserve(request, 11)  # within them
    tables.give_back(request)
    assert request.kv.block_table == [] and tables.num_available == 3


def test_a_shared_block_is_copied_before_it_is_written_to() -> None:
    tables = BlockTables(BlockPool(4), BLOCK)
    parent, child = make_request(list(range(6))), make_request(list(range(6)))
    assert tables.reserve(parent, 6)
    assert tables.fork(parent, child) == 5
    first, last = parent.kv.block_table
    assert child.kv.block_table == [first, last] and child.kv.num_computed_tokens == 5
    assert tables.reserve(child, 1)
    assert child.kv.block_table[0] == first and child.kv.block_table[1] != last
    assert tables.take_copies() == [(last, child.kv.block_table[1])]
    assert tables.take_copies() == []
    tables.give_back(parent)
    tables.give_back(child)
    assert tables.num_available == 4
    tables.pool.check()


def test_blocks_short_end_with_what_a_request_may_have() -> None:
    tables = BlockTables(BlockPool(20), BLOCK)
    request = make_request(list(range(6)), max_tokens=4)
    assert tables.num_short([request], 0) == 2
    assert tables.num_short([request], 100) == 3  # of 10 tokens
    assert tables.reserve(request, 6)
    assert tables.num_short([request, make_request([1])], 0) == 1


def test_who_ends_soon_makes_room_for_those_that_go_on() -> None:
    tables = BlockTables(BlockPool(20), BLOCK)
    ends, stays = (make_request(list(range(20)), max_tokens=n) for n in (1, 40))
    for request in (ends, stays):
        assert tables.reserve(request, 20)
        request.kv.num_computed_tokens = 19
    newcomer = make_request(list(range(8)), max_tokens=40)
    all_grown = 1 + 10 + 10  # blocks more, of the three
    assert tables.num_short([ends, stays], 40) == 11
    given_back = 20  # tokens of the one that ends first
    at_peak = (40 + 3) + (40 + 3) - given_back  # with any part of their last blocks
    assert tables.spare_for(newcomer, [ends, stays], 40) == -(-at_peak // BLOCK) < all_grown
