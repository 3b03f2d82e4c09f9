"""The disk tier: bytes, restarts, bounds and faults."""

import errno
import mmap
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from disk_helpers import (
    FAILED,
    LATE,
    MODEL,
    OK,
    PAYLOAD,
    Gate,
    buffer,
    content,
    filled,
    finish,
    has,
    opened,
    read,
    write,
)
from fakes import FakeClock
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.errors import TierError
from hotset.memory.disk import index as disk_index
from hotset.memory.disk.slab import FolderLock
from hotset.memory.disk.tier import DiskTier, capacity_bytes_for, payloads_within
from hotset.memory.tier import Completion, CompletionStatus


def store_bytes(folder: Path) -> int:
    return sum(max(p.stat().st_size, p.stat().st_blocks * 512) for p in folder.iterdir())


@settings(max_examples=25, deadline=None)
@given(data=st.binary(min_size=1, max_size=20_000), key=st.binary(min_size=1, max_size=64))
def test_any_payload_comes_back_bit_for_bit_now_and_after_a_restart(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, key: bytes
) -> None:
    folder = tmp_path_factory.mktemp("disk")
    payload = buffer(len(data))
    payload[: len(data)] = data
    with opened(folder, 2, payload_bytes=len(data)) as tier:
        assert tier.slot_bytes == payload.nbytes
        assert finish(tier, tier.submit_write(key, payload)).status is OK
        assert read(tier, key) == bytes(payload)
    with opened(folder, 2, payload_bytes=len(data)) as tier:
        assert read(tier, key) == bytes(payload)


def test_buffers_that_are_not_aligned_end_direct_io_but_lose_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        was_direct = tier.direct_io
        base = memoryview(bytearray(PAYLOAD + 4096 + 1))
        start = 1 if was_direct else 0
        unaligned = base[start : start + PAYLOAD]
        unaligned[:] = content(1)
        assert finish(tier, tier.submit_write(b"a", unaligned)).status is OK
        assert not (was_direct and tier.direct_io)
        assert read(tier, b"a") == content(1)
        assert tier.usage().faults == {}


def test_the_least_recently_used_block_goes_first_and_uses_are_reads_touches_and_writes(
    tmp_path: Path,
) -> None:
    with opened(tmp_path, 4) as tier:
        for seed, key in enumerate([b"a", b"b", b"c", b"d"]):
            assert write(tier, key, seed) is OK
        assert read(tier, b"a") == content(0)
        tier.touch([b"b", b"absent"])
        assert tier.submit_write(b"c", filled(2)) is None  # there already: a use, not a fault
        assert write(tier, b"e", 4) is OK
        assert [has(tier, key) for key in (b"a", b"b", b"c", b"d", b"e")] == [
            True,
            True,
            True,
            False,
            True,
        ]
        assert tier.usage().faults == {}
        tier.check()


def test_a_discarded_block_is_gone_at_once_and_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path, 3) as tier:
        for seed, key in enumerate([b"a", b"b", b"c"]):
            write(tier, key, seed)
        assert tier.newest_keys(2) == [b"c", b"b"]
        tier.discard([b"a", b"c", b"not there"])
        tier.check()
        assert tier.newest_keys(5) == [b"b"]
        write(tier, b"d", 4)  # into free room
        assert has(tier, b"b")
    with opened(tmp_path, 3) as tier:
        assert tier.newest_keys(5) == [b"d", b"b"]


def test_a_block_discarded_while_it_is_written_or_read_goes_when_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as tier:
        write(tier, b"read", 1)
        into = buffer()
        reads, writes = Gate(monkeypatch, "preadv"), Gate(monkeypatch, "pwritev")
        reading = tier.submit_read(b"read", into)
        writing = tier.submit_write(b"written", filled(2))
        wanted = tier.submit_write(b"wanted", filled(3))
        tier.discard([b"read", b"written", b"wanted"])
        tier.submit_write(b"wanted", filled(3))  # again, after all
        tier.check()
        reads.open.set()
        writes.open.set()
        ended: dict[int, CompletionStatus] = {}
        while len(ended) < 3:
            tier.wait(10.0)
            ended |= {completion.transfer_id: completion.status for completion in tier.poll()}
        assert ended == {reading: OK, writing: OK, wanted: OK}
        assert bytes(into) == content(1)
        tier.check()
        assert tier.newest_keys(5) == [b"wanted"]


def test_a_block_is_there_once_its_write_was_reported_and_is_not_written_twice(
    tmp_path: Path,
) -> None:
    with opened(tmp_path) as tier:
        first = tier.submit_write(b"a", filled(1))
        assert not has(tier, b"a")
        assert tier.submit_write(b"a", filled(1)) is None
        assert finish(tier, first).status is OK
        assert has(tier, b"a")
        assert tier.usage().used_payloads == 1
        assert tier.usage().faults == {}


def test_reading_what_is_not_there_fails_and_is_counted(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        assert read(tier, b"absent") is None
        assert tier.usage().faults == {"disk_missing": 1}


def test_buffers_are_let_go_once_their_transfer_was_reported(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        source, into = mmap.mmap(-1, PAYLOAD), mmap.mmap(-1, PAYLOAD)
        with memoryview(source) as payload:
            assert finish(tier, tier.submit_write(b"a", payload)).status is OK
        with memoryview(into) as payload:
            assert finish(tier, tier.submit_read(b"a", payload)).status is OK
        source.close()  # raises BufferError while anything holds a view
        into.close()


def test_a_restart_finds_everything_in_order_of_writing(tmp_path: Path) -> None:
    with opened(tmp_path, 8) as tier:
        for seed in range(12):
            assert write(tier, b"k%d" % seed, seed) is OK
    with opened(tmp_path, 8) as tier:
        assert tier.reclaimed is None
        assert tier.usage().used_payloads == 8
        for seed in range(12):
            assert has(tier, b"k%d" % seed) == (seed >= 4)
        assert write(tier, b"new", 99) is OK
        assert not has(tier, b"k4")
        for seed in range(5, 12):
            assert read(tier, b"k%d" % seed) == content(seed)
        tier.check()
        assert tier.usage().faults == {}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fingerprint": {**MODEL, "dtype": "bfloat16"}}, "dtype was float32, is bfloat16"),
        ({"fingerprint": {**MODEL, "layout": "2"}}, "layout was None, is 2"),
        ({"payload_bytes": 4096}, "payload_bytes was 8192, is 4096"),
    ],
)
def test_blocks_of_another_kind_are_not_used_and_their_space_is_reclaimed(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with opened(tmp_path) as tier:
        assert write(tier, b"a", 1) is OK
        assert write(tier, b"b", 2) is OK
    with opened(tmp_path, **changed) as tier:
        assert tier.reclaimed is not None
        assert said in tier.reclaimed
        assert not has(tier, b"a")
        assert tier.usage().used_payloads == 0
        assert tier.usage().faults == {}
        assert (tmp_path / "blocks.slab").read_bytes().count(0) == 8 * tier.slot_bytes
        assert write(tier, b"b", 2) is OK
    with opened(tmp_path) as tier:
        assert tier.reclaimed is not None
        assert tier.usage().used_payloads == 0


def test_another_capacity_keeps_the_blocks_that_still_fit(tmp_path: Path) -> None:
    with opened(tmp_path, 8) as tier:
        for seed in range(8):
            write(tier, b"k%d" % seed, seed)
    with opened(tmp_path, 4) as tier:
        assert tier.usage().used_payloads == 4
        assert (tmp_path / "blocks.slab").stat().st_size == 4 * PAYLOAD
        for seed in range(8):
            if has(tier, b"k%d" % seed):
                assert read(tier, b"k%d" % seed) == content(seed)
    with opened(tmp_path, 16) as tier:
        assert tier.usage().used_payloads == 4
        assert tier.usage().faults == {}
        tier.check()


def test_all_files_together_stay_within_the_capacity_while_blocks_come_and_go(
    tmp_path: Path,
) -> None:
    capacity_bytes = capacity_bytes_for(600, 4096)
    assert payloads_within(capacity_bytes, 4096) == 600
    assert payloads_within(capacity_bytes - 1, 4096) == 599
    payload = filled(0, 4096)
    most_bytes = 0
    with opened(tmp_path, payload_bytes=4096, capacity_bytes=capacity_bytes) as tier:
        assert tier.capacity_payloads == 600
        assert (tmp_path / "blocks.slab").stat().st_blocks * 512 >= 600 * 4096  # preallocated
        for turn in range(2500):  # one at a time, so that each overwrite is a transaction
            key = turn.to_bytes(64, "big")
            assert finish(tier, tier.submit_write(key, payload)).status is OK
            if turn % 50 == 0:
                most_bytes = max(most_bytes, store_bytes(tmp_path))
        most_bytes = max(most_bytes, store_bytes(tmp_path))
    assert 600 * 4096 < most_bytes <= capacity_bytes
    assert store_bytes(tmp_path) <= capacity_bytes


def test_a_capacity_below_one_block_is_refused_with_the_smallest_that_works(
    tmp_path: Path,
) -> None:
    with pytest.raises(TierError) as caught:
        DiskTier(
            tmp_path,
            payload_bytes=PAYLOAD,
            capacity_bytes=PAYLOAD,
            fingerprint=MODEL,
            read_deadline_s=1.0,
            write_queue_s=1.0,
        )
    smallest_bytes = int(str(caught.value).split()[-1])
    with opened(tmp_path, capacity_bytes=smallest_bytes) as tier:
        assert tier.capacity_payloads == 1
    with pytest.raises(TierError), opened(tmp_path, capacity_bytes=smallest_bytes - 1):
        pass


def test_more_than_the_disk_holds_is_refused_and_the_store_stays(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        write(tier, b"a", 1)
    stat = os.statvfs(tmp_path)
    too_much = stat.f_blocks * stat.f_frsize + 2**40
    other = {**MODEL, "dtype": "bfloat16"}
    for fingerprint in (MODEL, other):
        with (
            pytest.raises(TierError, match=r"asks for .* GB in .* can be had"),
            opened(tmp_path, capacity_bytes=too_much, fingerprint=fingerprint),
        ):
            pass
    with opened(tmp_path) as tier:
        assert read(tier, b"a") == content(1)


def test_a_folder_in_use_is_refused_in_one_line_and_free_again_afterwards(tmp_path: Path) -> None:
    with opened(tmp_path):
        with pytest.raises(TierError, match=f"in use by process {os.getpid()}") as caught:
            FolderLock(tmp_path)
        assert "\n" not in str(caught.value)
        with pytest.raises(TierError, match="in use"), opened(tmp_path):
            pass
    with opened(tmp_path):
        pass


def test_a_folder_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(TierError, match="cannot be used"), opened(tmp_path / "file"):
        pass
    (tmp_path / "index.sqlite").mkdir()
    with pytest.raises(TierError, match="cannot be used"), opened(tmp_path):
        pass


def test_blocks_are_committed_in_batches_and_soon_when_there_is_no_more_to_write(
    tmp_path: Path,
) -> None:
    with opened(tmp_path / "live", 200) as tier:
        for seed in range(130):
            assert write(tier, b"k%d" % seed, seed) is OK
            assert len(tier._files.index._pending) <= disk_index.BATCH_ROWS
        while tier._files.index._pending:  # for ever, if nothing commits the last batch
            time.sleep(0.01)
        shutil.copytree(tmp_path / "live", tmp_path / "copy")  # what a crash would leave
    with opened(tmp_path / "copy", 200) as tier:
        assert tier.usage().used_payloads == 130
        assert read(tier, b"k129") == content(129)


def test_the_store_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "disk"
    with opened(folder) as tier:
        write(tier, b"a", 1)
        assert folder.stat().st_mode & 0o077 == 0
        assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


def overwrite(folder: Path, offset: int, data: bytes) -> None:
    with (folder / "blocks.slab").open("r+b") as slab:
        slab.seek(offset)
        slab.write(data)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("offset", [0, PAYLOAD // 2 + 1, PAYLOAD - 1])
def test_one_flipped_bit_is_found_and_the_block_forgotten(
    tmp_path: Path, offset: int, restart: bool
) -> None:
    damaged = bytes([content(1)[offset] ^ 4])
    with opened(tmp_path) as tier:
        write(tier, b"a", 1)
        write(tier, b"b", 2)
        if not restart:
            overwrite(tmp_path, offset, damaged)
            assert read(tier, b"a") is None
            assert tier.usage().faults == {"disk_corrupt": 1}
            assert not has(tier, b"a")
            assert read(tier, b"b") == content(2)
            assert write(tier, b"a", 1) is OK
            assert read(tier, b"a") == content(1)
            tier.check()
    if restart:
        overwrite(tmp_path, offset, damaged)
        with opened(tmp_path) as tier:
            assert read(tier, b"a") is None
            assert read(tier, b"b") == content(2)
        with opened(tmp_path) as tier:  # forgotten for good
            assert not has(tier, b"a")


def test_swapped_slots_and_swapped_keys_are_found(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        for seed, key in enumerate([b"a", b"b", b"c", b"d"]):
            write(tier, key, seed)
    overwrite(tmp_path, 0, content(1) + content(0))
    db = sqlite3.connect(tmp_path / "index.sqlite")
    with db:
        db.execute("UPDATE blocks SET key = CASE slot WHEN 2 THEN x'64' ELSE x'63' END"
                   " WHERE slot IN (2, 3)")  # fmt: skip
    db.close()
    with opened(tmp_path) as tier:
        assert [read(tier, key) for key in (b"a", b"b", b"c", b"d")] == [None] * 4
        assert tier.usage().faults == {"disk_corrupt": 4}
        tier.check()


def test_a_slab_truncated_under_the_tier_costs_the_blocks_beyond_and_is_written_again(
    tmp_path: Path,
) -> None:
    with opened(tmp_path) as tier:
        for seed in range(8):
            write(tier, b"k%d" % seed, seed)
        os.truncate(tmp_path / "blocks.slab", 3 * PAYLOAD + 100)
        found = [read(tier, b"k%d" % seed) for seed in range(8)]
        assert found == [content(seed) for seed in range(3)] + [None] * 5
        assert sum(tier.usage().faults.values()) == 5
        assert tier.usage().faults["disk_truncated"] >= 4
        for seed in range(3, 8):
            assert write(tier, b"k%d" % seed, seed) is OK
        assert [read(tier, b"k%d" % seed) for seed in range(8)] == [content(s) for s in range(8)]


def test_a_slab_found_truncated_or_gone_keeps_the_blocks_before_its_end(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        for seed in range(8):
            write(tier, b"k%d" % seed, seed)
    os.truncate(tmp_path / "blocks.slab", 3 * PAYLOAD + 100)
    with opened(tmp_path) as tier:
        assert tier.usage().used_payloads == 3
        assert tier.usage().faults == {"disk_truncated": 5}
        assert read(tier, b"k2") == content(2)
    (tmp_path / "blocks.slab").unlink()
    with opened(tmp_path) as tier:
        assert tier.usage().used_payloads == 0
        assert write(tier, b"a", 1) is OK


def damage_header(path: Path) -> None:
    path.write_bytes(b"not a database" * 1000)


def damage_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = random.Random(0).randbytes(len(data) - 4096)
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def drop_table(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("DROP TABLE blocks")
    db.close()


def wrong_types(path: Path) -> None:
    db = sqlite3.connect(path)
    with db:
        db.execute("UPDATE blocks SET key = 'text'")
    db.close()


@pytest.mark.parametrize(
    "damage", [damage_header, damage_middle, cut, drop_table, wrong_types, Path.unlink]
)
def test_an_index_damaged_or_gone_at_open_means_an_empty_store_that_works(
    tmp_path: Path, damage: Any
) -> None:
    with opened(tmp_path) as tier:
        write(tier, b"a", 1)
    damage(tmp_path / "index.sqlite")
    with opened(tmp_path) as tier:
        assert tier.usage().used_payloads == 0
        assert tier.usage().faults == {"disk_index_damaged": 1}
        assert tier.reclaimed is not None
        assert write(tier, b"b", 2) is OK
        assert read(tier, b"b") == content(2)
        tier.check()
    with opened(tmp_path) as tier:
        assert tier.usage().faults == {}
        assert read(tier, b"b") == content(2)


def test_an_index_that_another_program_holds_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        write(tier, b"a", 1)
    db = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TierError, match="locked"), opened(tmp_path):
        pass
    db.close()
    with opened(tmp_path) as tier:
        assert read(tier, b"a") == content(1)


def test_an_index_damaged_while_open_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_index, "_RETRY_S", 0.0)
    with opened(tmp_path, 4) as tier:
        for seed in range(4):
            write(tier, b"k%d" % seed, seed)
        tier._files.index.flush()
        with (tmp_path / "index.sqlite-wal").open("r+b") as log:
            log.truncate(0)
        damage_header(tmp_path / "index.sqlite")
        results = [write(tier, b"new%d" % seed, seed) for seed in range(50)]
        assert OK in results
        assert results[-1] is OK
        faults = tier.usage().faults
        assert faults.keys() <= {"disk_index_failed"}
        tier.check()
    with opened(tmp_path, 4) as tier:
        # Whether or not SQLite noticed, what is there is right.
        for seed in range(50):
            if has(tier, b"new%d" % seed):
                assert read(tier, b"new%d" % seed) == content(seed)
        assert "disk_corrupt" not in tier.usage().faults


@contextmanager
def slab_replaced_by(tier: DiskTier, path: str, flags: int) -> Iterator[None]:
    """Make the tier's own descriptors refer to another file: real errors from the kernel."""
    slab = tier._files.slab
    fds = [fd for fd in (slab._fd, slab._direct_fd) if fd is not None]
    saved = [os.dup(fd) for fd in fds]
    other = os.open(path, flags)
    for fd in fds:
        os.dup2(other, fd, inheritable=False)
    os.close(other)
    try:
        yield
    finally:
        for fd, copy in zip(fds, saved, strict=True):
            os.dup2(copy, fd, inheritable=False)
            os.close(copy)


@pytest.mark.parametrize(
    ("path", "flags", "fault"),
    [("/dev/full", os.O_RDWR, "disk_full"), (None, os.O_RDONLY, "disk_read_only")],
)
def test_writes_that_keep_failing_pause_the_tier_and_reads_go_on(
    tmp_path: Path, path: str | None, flags: int, fault: str
) -> None:
    clock = FakeClock()
    with opened(tmp_path, 4, num_threads=1, clock=clock) as tier:
        assert write(tier, b"a", 1) is OK
        with slab_replaced_by(tier, path or str(tmp_path / "blocks.slab"), flags):
            for turn in range(3):
                assert write(tier, b"k%d" % turn, turn) is FAILED
            assert tier.submit_write(b"k3", filled(3)) is None
            assert tier.usage().faults == {fault: 3, "disk_write_dropped": 1}
            if flags == os.O_RDONLY:
                assert read(tier, b"a") == content(1)
        tier.check()
        clock.now_s += 11.0
        assert write(tier, b"k3", 3) is OK
        assert read(tier, b"k3") == content(3)
        assert read(tier, b"a") == content(1)


def test_a_file_size_limit_costs_blocks_and_never_the_process(tmp_path: Path) -> None:
    """A real limit of the kernel on slab and index at once, in a process of its own."""
    with opened(tmp_path, 64) as tier:
        assert write(tier, b"before", 0) is OK
    script = f"""
import resource, sys
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
from pathlib import Path
from hotset.errors import TierError
from disk_helpers import *
folder = Path({str(tmp_path)!r})
with opened(folder, 64) as tier:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192 * 3, 8192 * 80))
    results = [tier.submit_write(b"k%d" % seed, filled(seed)) for seed in range(60)]
    while tier._moving:
        tier.wait(10.0)
        tier.poll()
    assert read(tier, b"before") == content(0)
    assert read(tier, b"k0") == content(0)
    assert not has(tier, b"k50")
    tier.check()
    print(sorted(tier.usage().faults))
try:
    opened(folder, 100).__enter__()
except TierError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "disk_full" in result.stdout
    assert "asks for 0.001 GB" in result.stdout
    with opened(tmp_path, 64) as tier:
        assert read(tier, b"before") == content(0)
        assert "disk_corrupt" not in tier.usage().faults


def test_a_slow_read_is_late_once_and_ends_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, read_deadline_s=0.05) as tier:
        write(tier, b"a", 1)
        gate = Gate(monkeypatch, "preadv")
        into = buffer()
        transfer_id = tier.submit_read(b"a", into)
        assert gate.entered.wait(10.0)
        seen: list[Completion] = []
        while not seen:
            tier.wait(10.0)
            seen += tier.poll()
        assert seen == [Completion(transfer_id, b"a", LATE)]
        tier.check()
        assert tier.poll() == []
        gate.open.set()
        assert finish(tier, transfer_id).status is OK
        assert bytes(into) == content(1)
        assert has(tier, b"a")
        assert tier.usage().faults == {"disk_read_late": 1}


def test_reads_queued_behind_a_stuck_one_fail_at_their_deadline_without_touching_the_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, read_deadline_s=0.05, num_threads=1) as tier:
        write(tier, b"a", 1)
        write(tier, b"b", 2)
        gate = Gate(monkeypatch, "preadv")
        stuck = tier.submit_read(b"a", buffer())
        assert gate.entered.wait(10.0)
        into = buffer()
        assert finish(tier, tier.submit_read(b"b", into)).status is FAILED
        assert bytes(into) == bytes(PAYLOAD)
        assert has(tier, b"b")  # late, not damaged
        tier.check()
        gate.open.set()
        assert finish(tier, stuck).status is OK
        tier.check()


def test_a_slow_write_never_delays_a_read_and_what_waits_behind_it_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, write_queue_s=0.05, num_threads=1) as tier:
        write(tier, b"a", 1)
        gate = Gate(monkeypatch, "pwritev")
        stuck = tier.submit_write(b"stuck", filled(2))
        assert gate.entered.wait(10.0)
        queued = tier.submit_write(b"queued", filled(3))
        assert read(tier, b"a") == content(1)
        assert finish(tier, queued).status is FAILED
        assert tier.usage().faults == {"disk_write_dropped": 1}
        tier.check()
        gate.open.set()
        assert finish(tier, stuck).status is OK
        assert read(tier, b"stuck") == content(2)


def test_a_block_being_read_is_not_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, 2) as tier:
        write(tier, b"a", 1)
        write(tier, b"b", 2)
        gate = Gate(monkeypatch, "preadv")
        ids = [tier.submit_read(key, buffer()) for key in (b"a", b"b")]
        assert tier.submit_write(b"c", filled(3)) is None
        assert tier.usage().faults == {"disk_write_dropped": 1}
        gate.open.set()
        done: list[Completion] = []
        while len(done) < 2:
            tier.wait(10.0)
            done += tier.poll()
        assert {c.transfer_id: c.status for c in done} == dict.fromkeys(ids, OK)
        assert write(tier, b"c", 3) is OK
        assert not has(tier, b"a")


def test_more_writes_than_the_measured_pace_allows_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, 64, write_queue_s=1.0, num_threads=1) as tier:
        write(tier, b"first", 1)
        tier._mean_write_s = 0.3
        gate = Gate(monkeypatch, "pwritev")
        tier.submit_write(b"running", filled(2))
        assert gate.entered.wait(10.0)
        ids = [tier.submit_write(b"k%d" % n, filled(n)) for n in range(10)]
        assert [transfer_id is not None for transfer_id in ids] == [True] * 4 + [False] * 6
        assert tier.usage().faults == {"disk_write_dropped": 6}
        gate.open.set()
        assert finish(tier, ids[3]).status in (OK, FAILED)


def test_closing_with_a_full_queue_ends_soon_and_reports_what_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, 16, num_threads=1) as tier:
        gate = Gate(monkeypatch, "pwritev")
        ids = [tier.submit_write(b"k%d" % n, filled(n)) for n in range(10)]
        assert gate.entered.wait(10.0)
        threading.Timer(0.1, gate.open.set).start()
        tier.close()
        ended = {completion.transfer_id: completion.status for completion in tier.poll()}
        assert ended == {ids[0]: OK, **dict.fromkeys(ids[1:], FAILED)}
        assert tier.submit_write(b"after", filled(1)) is None
        assert read(tier, b"k0") is None
    with opened(tmp_path, 16) as tier:
        assert tier.usage().used_payloads == 1
        assert read(tier, b"k0") == content(0)


def test_closing_over_a_stuck_transfer_keeps_the_folder_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotset.memory.disk.tier._CLOSE_S", 0.1)
    with opened(tmp_path) as tier:
        gate = Gate(monkeypatch, "pwritev")
        tier.submit_write(b"a", filled(1))
        assert gate.entered.wait(10.0)
        tier.close()
        with pytest.raises(TierError, match="in use"), opened(tmp_path):
            pass
        gate.open.set()
        tier._writes.close(10.0)
        # What the process's end would do.
        tier._files.close()
        with suppress(ValueError):
            tier.poll()


def test_random_faults_cost_blocks_and_never_a_wrong_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors, short transfers and flipped bits at random, in reads and writes that overlap."""
    monkeypatch.setattr("hotset.memory.disk.tier._PAUSE_S", 0.002)
    chance = random.Random(5)
    preadv, pwritev = os.preadv, os.pwritev

    def faulty(call: Any, fd: int, buffers: list[memoryview], offset: int) -> int:
        roll = chance.random()
        if roll < 0.05:
            raise OSError(chance.choice([errno.EIO, errno.ENOSPC, errno.EROFS]), "injected")
        if roll < 0.10:
            return int(call(fd, [buffers[0][:4096]], offset))
        if roll < 0.12 and call is preadv:
            return 0
        count = int(call(fd, buffers, offset))
        if roll > 0.95 and call is preadv:
            buffers[0][chance.randrange(count)] ^= 1 << chance.randrange(8)
        return count

    monkeypatch.setattr(os, "preadv", lambda *args: faulty(preadv, *args))
    monkeypatch.setattr(os, "pwritev", lambda *args: faulty(pwritev, *args))
    kinds = {"corrupt", "truncated", "io_error", "full", "read_only", "write_dropped"}
    payloads = [filled(number) for number in range(24)]
    buffers = [buffer() for _ in range(12)]
    reads: dict[int, memoryview] = {}
    writes: set[int] = set()
    ended: Counter[tuple[str, CompletionStatus]] = Counter()

    def poll(tier: DiskTier) -> None:
        for completion in tier.poll():
            if completion.transfer_id in writes:
                writes.remove(completion.transfer_id)
                ended["write", completion.status] += 1
                continue
            into = reads.pop(completion.transfer_id)
            ended["read", completion.status] += 1
            if completion.status is OK:
                assert into == payloads[int(completion.key)]
            buffers.append(into)
        tier.check()

    with opened(tmp_path, 16) as tier:
        # Until everything has happened; a tier in which it cannot never ends.
        while (
            len(ended) < 4
            or min(ended.values()) < 50
            or tier.usage().faults.keys() != {f"disk_{kind}" for kind in kinds}
        ):
            number = chance.randrange(len(payloads))
            key = b"%d" % number
            if not has(tier, key):
                transfer_id = tier.submit_write(key, payloads[number])
                if transfer_id is not None:
                    writes.add(transfer_id)
            elif buffers:
                into = buffers.pop()
                reads[tier.submit_read(key, into)] = into
            if chance.random() < 0.3:
                tier.wait(0.001)
            poll(tier)
        while reads or writes:
            tier.wait(10.0)
            poll(tier)
    monkeypatch.undo()
    with opened(tmp_path, 16) as tier:
        assert tier.usage().used_payloads > 0
        for number in range(len(payloads)):
            if has(tier, b"%d" % number):
                assert read(tier, b"%d" % number) == payloads[number]
        assert tier.usage().faults == {}
