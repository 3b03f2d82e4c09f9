"""The disk tier against a dictionary in LRU order: random operations, checked after each."""

import shutil
import tempfile
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

from disk_helpers import MODEL, buffer, has
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from hotset.memory.disk.tier import DiskTier, capacity_bytes_for
from hotset.memory.tier import Completion, CompletionStatus

PAYLOAD_BYTES = 4096
CAPACITY = 4
KEYS = [b"key %d" % number for number in range(8)]

keys = st.sampled_from(KEYS)


@dataclass(eq=False)
class Block:
    content: bytes
    damaged: bool = False


class DiskMachine(RuleBasedStateMachine):
    """Any number of reads and writes may be in flight; `poll` is a step like any other.

    The model is exact: what is stored, in which order it would go, what is pinned, what each
    read must bring. Nothing drawn depends on it, as when a transfer ends is up to the threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.tier = self.open()
        self.stored: OrderedDict[bytes, Block] = OrderedDict()
        self.writing: dict[int, tuple[bytes, Block]] = {}
        self.reading: dict[int, tuple[bytes, Block | None, memoryview]] = {}
        self.unwanted: set[bytes] = set()  # keys being written that were discarded since
        self.faults: Counter[str] = Counter()

    def open(self) -> DiskTier:
        return DiskTier(
            self.folder,
            payload_bytes=PAYLOAD_BYTES,
            capacity_bytes=capacity_bytes_for(CAPACITY, PAYLOAD_BYTES),
            fingerprint=MODEL,
            read_deadline_s=60.0,
            write_queue_s=60.0,
        )

    def teardown(self) -> None:
        self.tier.close()
        shutil.rmtree(self.folder)

    @rule(key=keys, data=st.binary(min_size=1, max_size=64))
    def write(self, key: bytes, data: bytes) -> None:
        payload = buffer(PAYLOAD_BYTES)
        payload[: len(data)] = data
        transfer_id = self.tier.submit_write(key, payload)
        if key in self.stored or key in {key for key, _ in self.writing.values()}:
            assert transfer_id is None
            self.unwanted.discard(key)
            if key in self.stored:
                self.stored.move_to_end(key)
            return
        pinned = {block for _, block, _ in self.reading.values() if block}
        if len(pinned.union(self.stored.values())) + len(self.writing) == CAPACITY:
            victims = [key for key, block in self.stored.items() if block not in pinned]
            if not victims:
                assert transfer_id is None
                self.faults["disk_write_dropped"] += 1
                return
            del self.stored[victims[0]]
        assert transfer_id is not None
        self.writing[transfer_id] = (key, Block(bytes(payload)))

    @rule(key=keys)
    def read(self, key: bytes) -> None:
        into = buffer(PAYLOAD_BYTES)
        transfer_id = self.tier.submit_read(key, into)
        self.reading[transfer_id] = (key, self.stored.get(key), into)
        if key in self.stored:
            self.stored.move_to_end(key)

    @rule(touched=st.lists(keys, max_size=3))
    def touch(self, touched: list[bytes]) -> None:
        self.tier.touch(touched)
        for key in touched:
            if key in self.stored:
                self.stored.move_to_end(key)

    @rule(discarded=st.lists(keys, min_size=1, max_size=3, unique=True))
    def discard(self, discarded: list[bytes]) -> None:
        self.tier.discard(discarded)
        writing = {key for key, _ in self.writing.values()}
        for key in discarded:
            self.stored.pop(key, None)
        self.unwanted |= writing.intersection(discarded)

    @rule(key=keys, offset=st.integers(0, PAYLOAD_BYTES - 1))
    def damage(self, key: bytes, offset: int) -> None:
        self.wait_for_all()
        if key not in self.stored or self.stored[key].damaged:
            return
        self.stored[key].damaged = True
        changed = self.stored[key].content[offset] ^ 1
        with (self.folder / "blocks.slab").open("r+b") as slab:
            slab.seek(self.tier._blocks[key].slot * PAYLOAD_BYTES + offset)
            slab.write(bytes([changed]))

    @rule()
    def poll(self) -> None:
        for completion in self.tier.poll():
            if completion.transfer_id in self.writing:
                self.settle_write(completion)
            else:
                self.settle_read(completion)

    def settle_write(self, completion: Completion) -> None:
        key, block = self.writing.pop(completion.transfer_id)
        assert completion == Completion(completion.transfer_id, key, CompletionStatus.OK)
        if key not in self.unwanted:
            self.stored[key] = block
        self.unwanted.discard(key)

    def settle_read(self, completion: Completion) -> None:
        key, block, into = self.reading.pop(completion.transfer_id)
        ok = block is not None and not block.damaged
        status = CompletionStatus.OK if ok else CompletionStatus.FAILED
        assert completion == Completion(completion.transfer_id, key, status)
        if block is None:
            self.faults["disk_missing"] += 1
        elif block.damaged:
            self.faults["disk_corrupt"] += 1
            if self.stored.get(key) is block:
                del self.stored[key]
        else:
            assert bytes(into) == block.content

    @rule()
    def wait_for_all(self) -> None:
        while self.reading or self.writing:
            self.tier.wait(10.0)
            self.poll()

    @rule()
    def restart(self) -> None:
        self.wait_for_all()
        assert list(self.tier._order) == list(self.stored)
        self.tier.close()
        self.tier = self.open()
        assert self.tier.reclaimed is None
        order = list(self.tier._order)  # of writing, which is all that is kept
        assert set(order) == set(self.stored)
        self.stored = OrderedDict((key, self.stored[key]) for key in order)
        self.faults.clear()

    @invariant()
    def agrees(self) -> None:
        self.tier.check()
        assert [key for key in KEYS if has(self.tier, key)] == sorted(self.stored)
        assert self.tier.newest_keys(3) == list(reversed(self.stored))[:3]
        usage = self.tier.usage()
        assert (usage.used_payloads, usage.capacity_payloads) == (len(self.stored), CAPACITY)
        assert usage.faults == dict(self.faults)


def test_random_operations_agree_with_a_dictionary() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        DiskMachine,
        settings=settings(max_examples=60, stateful_step_count=40, deadline=None),
    )
