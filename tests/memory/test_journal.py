"""What followers are told of the tiers' content, against what the tiers say."""

import pytest

from hotset.kv.pool import BlockPool
from hotset.memory import journal as module
from hotset.memory.journal import Journal, JournalPart, rows_of


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def filled(pool: BlockPool, *numbers: int) -> list[int]:
    blocks = pool.allocate(len(numbers))
    for block, number in zip(blocks, numbers, strict=True):
        pool.publish(block, key(number))
    return blocks


def changes(part: JournalPart | None) -> list[tuple[int, int, bool]]:
    assert part is not None
    return [(int.from_bytes(k, "big"), tier, there) for k, tier, there in rows_of(part.changes)]


def content(part: JournalPart | None) -> list[int]:
    assert part is not None and part.content is not None
    return [int.from_bytes(key, "big") for key, _, _ in rows_of(part.content)]


def test_a_snapshot_names_what_is_there_and_changes_follow_in_order() -> None:
    pool = BlockPool(4)
    journal = Journal({"device": pool})
    filled(pool, 1, 2)
    assert not journal.has_news and journal.take() is None  # nobody follows
    journal.follow(True)
    part = journal.take()
    assert part is not None and part.first == 0 and part.begins and part.ends
    assert sorted(content(part)) == [1, 2] and not part.changes
    [block] = filled(pool, 3)
    pool.unpublish(block)
    part = journal.take()
    assert changes(part) == [(3, 0, True), (3, 0, False)] and part.content is None
    assert journal.take() is None
    pool.publish(block, key(4))
    part = journal.take()
    assert part is not None and part.first == 2 and part.next == 3
    journal.follow(False)
    pool.unpublish(block)
    assert journal.take() is None


def test_a_long_snapshot_comes_in_parts_and_leaves_out_what_went_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MOST_CONTENT", 2)
    pool = BlockPool(8)
    journal = Journal({"device": pool})
    filled(pool, 1, 2, 3)
    journal.follow(True)
    first = journal.take()
    assert first is not None and first.begins and not first.ends and content(first) == [2, 3]
    pool.discard(key(1))
    filled(pool, 4)
    journal.follow(True)  # another follower: its snapshot comes after this one
    last = journal.take()
    assert last is not None and last.ends and not last.begins and content(last) == []
    assert changes(last) == [(1, 0, False), (4, 0, True)]
    again = journal.take()
    assert again is not None and again.begins and content(again) == [3, 4]
    rest = journal.take()
    assert rest is not None and rest.ends and content(rest) == [2]
    assert not journal.has_news


def test_changes_that_nobody_takes_are_bounded_and_their_numbers_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MOST_CHANGES", 3)
    pool = BlockPool(8)
    journal = Journal({"device": pool})
    journal.follow(True)
    journal.take()
    filled(pool, 1, 2, 3, 4)
    part = journal.take()
    assert part is not None and part.first == 3 and changes(part) == [(4, 0, True)]


@pytest.mark.parametrize("rows", [b"short", key(1) + b"\x08"])
def test_rows_that_make_no_sense_are_refused(rows: bytes) -> None:
    with pytest.raises(ValueError, match="a journal"):
        list(rows_of(rows))


def test_what_two_lanes_have_is_told_once() -> None:
    first, second = BlockPool(4), BlockPool(4)
    journal = Journal({"device": first}, {"device": second})
    journal.follow(True)
    assert content(journal.take()) == []
    filled(first, 1, 2)
    filled(second, 2, 3)
    assert changes(journal.take()) == [(1, 0, True), (2, 0, True), (3, 0, True)]
    first.discard(key(1))
    first.discard(key(2))
    assert changes(journal.take()) == [(1, 0, False)]  # the other lane still has 2
    second.discard(key(2))
    assert changes(journal.take()) == [(2, 0, False)]
