"""The remote tier over a real server, and over one that is full, wrong, hostile, slow or gone."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import FakeClock
from stores import (
    PAYLOAD_BYTES,
    FakeStore,
    answer,
    content,
    ended,
    key,
    needs_redis,
    read,
    redis_server,
    remote,
    seal,
    until,
    write,
)

from hotset.errors import TierError
from hotset.memory.remote.revoke import revoke
from hotset.memory.remote.seal import HEADER_BYTES
from hotset.memory.remote.tier import RemoteTier
from hotset.memory.tier import Answer, CompletionStatus

OK, FAILED = CompletionStatus.OK, CompletionStatus.FAILED


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FakeStore]:
    store = FakeStore(tmp_path)
    yield store
    store.close()


@pytest.fixture
def tier(store: FakeStore) -> Iterator[RemoteTier]:
    tier = remote(store.url)
    store.values.clear()
    yield tier
    tier.close()


def faults(tier: RemoteTier) -> dict[str, int]:
    return tier.usage().faults


@needs_redis
@pytest.mark.parametrize("encrypts", [False, True])
def test_blocks_come_back_bit_for_bit_in_another_process_of_the_same_secret(encrypts: bool) -> None:
    with redis_server("--requirepass", "word") as url:
        url += "?password=word"
        one, other = remote(url, by=seal(encrypts=encrypts)), remote(url)
        assert one.info.capacity_payloads > 1000 and one.info.measured_bytes_per_s is not None
        assert [write(one, number).status for number in range(5)] == [OK] * 5
        for number in range(5):
            assert answer(other, number) is Answer.HIT
            completion, found = read(other, number)
            assert completion.status is OK and found == content(number)
        assert answer(other, 6) is Answer.MISS
        until(lambda: other.usage().byte_counts["first_read"] == 5 * PAYLOAD_BYTES)
        read(one, 0)
        assert one.usage().byte_counts["first_read"] == 0
        other.discard([key(3)])
        write(other, 7)  # comes after the deletion
        assert read(one, 3)[0].fault == "missing"
        assert faults(one) == {"remote_missing": 1} and faults(other) == {}
        one.close()
        other.close()


@needs_redis
def test_a_server_that_is_full_evicts_and_what_it_lost_is_missing() -> None:
    with redis_server(maxmemory="4mb") as url:
        tier = remote(url)
        for number in range(600):
            assert write(tier, number).status is OK
        answers = [read(tier, number)[0].fault for number in range(600)]
        assert {None, "missing"} == set(answers)
        tier.close()


@needs_redis
def test_a_full_server_that_evicts_nothing_refuses_writes_and_is_read_on() -> None:
    with redis_server("--maxmemory-policy", "noeviction", maxmemory="2mb") as url:
        tier = remote(url)
        results = [write(tier, number).fault for number in range(200)]
        assert set(results) == {None, "full"}
        assert read(tier, 0)[1] == content(0)
        tier.close()


@needs_redis
def test_three_stores_share_the_keys_and_one_that_dies_is_a_third_of_the_misses() -> None:
    with redis_server() as first, redis_server() as second:
        with redis_server() as third:
            tier, other = remote(first, second, third), remote(third, first, second)
            for number in range(60):
                assert write(tier, number).status is OK
            assert all(answer(other, number) is Answer.HIT for number in range(60))
        statuses = [read(other, number)[0].status for number in range(60)]
        assert 8 <= statuses.count(FAILED) <= 32
        tier.close()
        other.close()


@needs_redis
def test_a_revoked_writer_is_refused_by_all_that_look() -> None:
    with redis_server() as url:
        tier = remote(url)
        write(tier, 1)
        assert revoke([url], "writer") == [url.removeprefix("unix://")]
        other = remote(url, by=seal(writer="other"))
        assert read(other, 1)[0].fault == "revoked"
        assert answer(other, 1) is Answer.MISS  # and deleted
        tier.close()
        other.close()


def test_a_store_without_a_bound_is_refused_at_start(store: FakeStore) -> None:
    store.max_memory = 0
    with pytest.raises(TierError, match=r"has no bound.*start it with --maxmemory"):
        remote(store.url)


def test_a_wrong_password_is_refused_at_start_in_one_line(tmp_path: Path) -> None:
    store = FakeStore(tmp_path, password=b"right")
    with pytest.raises(TierError, match=r"the store /.*: WRONGPASS") as caught:
        remote(f"{store.url}?password=guess")
    assert "guess" not in str(caught.value)
    remote(f"{store.url}?password=right").close()
    store.close()


def test_a_store_that_is_not_there_at_start_is_a_note_and_used_once_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotset.memory.remote.lane.REFRESH_S", 0.05)
    tier = remote(f"unix://{tmp_path / 'fake'}")
    assert "is of no use yet" in tier.notes[0]
    assert tier.info.measured_bytes_per_s == tier.usage().measured_bytes_per_s == 100e6
    assert tier.lookup([key(1)]) == [Answer.MISS]
    assert tier.submit_write(key(1), memoryview(content(1)), must=True) is None
    assert read(tier, 1)[0].fault == "down"
    store = FakeStore(tmp_path)
    payload = memoryview(content(1))
    until(lambda: tier.submit_write(key(1), payload, must=True) is not None)
    until(lambda: tier.usage().measured_bytes_per_s != 100e6)  # no longer what was assumed
    tier.close()
    store.close()


def stored(store: FakeStore, tier: RemoteTier, number: int) -> bytes:
    """The name under which a written payload is stored."""
    before = set(store.values)
    assert write(tier, number).status is OK
    [name] = set(store.values) - before
    return name


def flipped(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (flipped, "forged"),
        (lambda value: b"HSG0" + value[4:], "foreign"),
        (lambda value: value[:HEADER_BYTES] + bytes(PAYLOAD_BYTES), "forged"),
        (lambda value: bytes(len(value)), "foreign"),
    ],
)
def test_a_value_that_was_changed_is_a_miss_and_a_counter_and_is_deleted(
    store: FakeStore, tier: RemoteTier, change: Callable[[bytes], bytes], fault: str
) -> None:
    name = stored(store, tier, 1)
    store.values[name] = change(store.values[name])
    completion, _ = read(tier, 1)
    assert (completion.status, completion.fault) == (FAILED, fault)
    assert faults(tier)[f"remote_{fault}"] == 1
    assert answer(tier, 1) is Answer.MISS
    until(lambda: name not in store.values)


def test_values_swapped_between_keys_are_refused(store: FakeStore, tier: RemoteTier) -> None:
    one, two = stored(store, tier, 1), stored(store, tier, 2)
    store.values[one], store.values[two] = store.values[two], store.values[one]
    assert [read(tier, number)[0].fault for number in (1, 2)] == ["forged", "forged"]


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES, PAYLOAD_BYTES, 2 * PAYLOAD_BYTES])
def test_a_value_of_another_length_is_a_miss_when_asked_for_and_when_read(
    store: FakeStore, tier: RemoteTier, length: int
) -> None:
    name = stored(store, tier, 1)
    store.values[name] = bytes(length)
    fresh = remote(store.url)
    assert answer(fresh, 1) is Answer.MISS
    fresh.close()
    assert read(tier, 1)[0].fault == "foreign"
    assert read(tier, 2)[0].fault == "missing"  # over another connection


@pytest.mark.parametrize(
    "reply",
    [b"+OK\r\n", b":5\r\n", b"*1\r\n", b"$-5\r\n", b"$x\r\n", b"$8256\r\nshort", b"\0" * 99],
)
def test_replies_that_are_none_are_a_failed_read(
    store: FakeStore, tier: RemoteTier, reply: bytes
) -> None:
    stored(store, tier, 1)
    store.replies[b"GET"] = lambda name: reply
    completion, _ = read(tier, 1)
    assert completion.status is FAILED and completion.fault in ("protocol", "late")
    del store.replies[b"GET"]
    assert read(tier, 1)[1] == content(1)


def test_one_that_never_answers_is_asked_once_and_left_alone_after_three_failures(
    store: FakeStore, tier: RemoteTier
) -> None:
    stored(store, tier, 1)
    for name in (b"GET", b"SET", b"STRLEN", b"PING", b"INFO"):
        store.replies[name] = lambda *words: None
    assert tier.lookup([key(2), key(3)]) == [Answer.PENDING] * 2
    time.sleep(0.11)
    assert tier.lookup([key(2), key(4)]) == [Answer.MISS] * 2  # none waits for it any more
    into = bytearray(PAYLOAD_BYTES)
    for _ in range(3):
        ended(tier, tier.submit_read(key(1), memoryview(into)))
    assert tier.submit_write(key(9), memoryview(content(9)), must=True) is None
    asked = len(store.asked)
    assert tier.lookup([key(5)]) == [Answer.MISS]
    assert read(tier, 1)[0].fault == "down"
    assert len(store.asked) == asked
    into[:] = b"x" * PAYLOAD_BYTES  # no thread writes to it any more
    time.sleep(0.02)
    assert into == b"x" * PAYLOAD_BYTES


def test_a_read_is_late_by_its_deadline_and_ends_afterwards(
    store: FakeStore, tier: RemoteTier
) -> None:
    stored(store, tier, 1)
    store.replies[b"GET"] = lambda name: None
    transfer_id = tier.submit_read(key(1), memoryview(bytearray(PAYLOAD_BYTES)))
    statuses = []
    until_s = time.monotonic() + 5
    while FAILED not in statuses:
        assert time.monotonic() < until_s
        tier.wait(0.01)
        statuses += [one.status for one in tier.poll() if one.transfer_id == transfer_id]
    assert statuses in ([CompletionStatus.LATE, FAILED], [FAILED])
    assert faults(tier)["remote_late"] == 1


def test_what_is_new_is_declined_and_written_once_it_is_of_use(store: FakeStore) -> None:
    clock = FakeClock()
    tier = remote(store.url, clock=clock)
    clock.now_s = 100.0
    chain = [key(number) for number in (3, 2, 1)]
    payload = memoryview(content(1))
    assert tier.submit_write(key(1), payload) is None
    assert tier.usage().byte_counts["declined"] == PAYLOAD_BYTES
    assert tier.touch(chain, came_back=True) == [key(1), key(2), key(3)]  # its beginning first
    transfer_id = tier.submit_write(key(1), payload, must=True)
    assert transfer_id is not None and ended(tier, transfer_id).status is OK
    assert tier.touch(chain, came_back=True) == [key(2), key(3)]
    assert tier.submit_write(key(1), payload, must=True) is None  # it is there
    tier.close()


def test_no_more_writes_are_on_their_way_than_said(store: FakeStore) -> None:
    tier = remote(store.url, most_writes=2)
    store.replies[b"SET"] = lambda *words: None
    ids = [tier.submit_write(key(n), memoryview(content(n)), must=True) for n in range(3)]
    assert ids[2] is None and None not in ids[:2]
    assert faults(tier)["remote_write_dropped"] == 1
    tier.close()
    assert {one.status for one in tier.poll()} == {FAILED}


def test_what_is_discarded_while_it_is_written_is_not_found(
    store: FakeStore, tier: RemoteTier
) -> None:
    tier.submit_write(key(1), memoryview(content(1)), must=True)
    tier.discard([key(1)])
    write(tier, 2)
    assert answer(tier, 1) is Answer.MISS and len(store.values) == 1


def test_a_journal_hears_what_comes_and_goes(store: FakeStore, tier: RemoteTier) -> None:
    heard = list[tuple[bytes, bool]]()
    tier.on_change = lambda one, is_there: heard.append((one, is_there))
    name = stored(store, tier, 1)
    assert tier.newest_keys(5) == [key(1)]
    del store.values[name]
    read(tier, 1)
    assert heard == [(key(1), True), (key(1), False)] and tier.newest_keys(5) == []
