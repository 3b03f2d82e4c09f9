"""Fakes, written once."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

from hotset.cost.cache_spec import KEYS_ALONE
from hotset.engine.step import Step
from hotset.executor.step_input import StepInput, StepResult
from hotset.memory.tier import (
    Answer,
    Completion,
    CompletionStatus,
    EndedTransfer,
    Found,
    TierInfo,
    TierUsage,
)
from hotset.request import SamplingParams
from hotset.sequence import Request

T = TypeVar("T")


class FakeClock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s


@dataclass
class FakeDevice:
    """Device blocks whose content is the tokens they are for.

    Of hot requests it knows what steps tell it: which slots of host memory their blocks are in.
    Index blocks, of which `values` are per whole block, lie in the rows of whole blocks.
    """

    block_size: int
    blocks: dict[int, list[int | None]] = field(default_factory=dict)
    keys: dict[int, list[int | None]] = field(default_factory=dict)  # index keys of blocks
    first_index_block: int = 2**31
    values: tuple[int, int] = (1, 1)  # of a token's rows, and of its index keys
    host: Callable[[int], list[int | None]] | None = None
    seats: dict[int, dict[int, int]] = field(default_factory=dict)

    def content(self, block: int) -> list[int | None]:
        return self.blocks.setdefault(block, [None] * self.block_size)

    def fill(self, block: int, content: list[int | None] | None) -> None:
        """What came to a block; None where it did not come."""
        self.blocks[block] = [None] * self.block_size if content is None else list(content)
        self.keys[block] = list(self.blocks[block])

    def copy(self, plan: Step) -> None:
        """Copy blocks as the plan says."""
        for keys_alone, group in groupby(plan.copies, lambda copy: copy[1] & KEYS_ALONE):
            if not keys_alone:
                for source, target in group:
                    self.keys[target] = list(self.keys[source])
                    self.blocks[target] = list(self.content(source))
                continue
            found = [(target ^ KEYS_ALONE, list(self.keys[source])) for source, target in group]
            for number, keys in found:
                self.write_keys(number, keys)

    def write_keys(self, number: int, keys: list[int | None]) -> None:
        """Write an index block, which lies in a whole one."""
        self.keys[number] = list(keys)
        whole = number
        if number >= self.first_index_block:
            whole = (number - self.first_index_block) * self.values[1] // self.values[0]
        self.blocks[whole] = [None] * self.block_size

    def compute(self, plan: Step) -> None:
        """Check that all tokens before those of the plan are in place, and write those."""
        self.copy(plan)
        if plan.seats is not None:
            self.seats.update({reset.seat: {} for reset in plan.seats.resets})
            for seat, index, slot in plan.seats.places:
                self.seats[seat][index] = slot
        written = set()
        for item in plan.items:
            request, size = item.request, self.block_size
            if request.is_finished:
                continue  # while the step was prepared
            for block in request.kv.slot_blocks:  # whatever was selected comes there
                assert block < self.first_index_block
                self.blocks[block] = [None] * size
            for i in range(item.start):
                keys = self.keys[request.kv.block_table[i // size] & ~KEYS_ALONE]
                assert keys[i % size] == request.token_ids[i], "another token's index key"
                content = self.past(request, i // size)
                assert content[i % size] == request.token_ids[i], "attention reads another's token"
            for i in range(item.start, item.start + item.num_tokens):
                place = (request.kv.block_table[i // size], i % size)
                assert place not in written, "two requests write to one place"
                written.add(place)
                self.content(place[0])[place[1]] = request.token_ids[i]
                keys = self.keys.setdefault(place[0], [None] * size)
                keys[place[1]] = request.token_ids[i]

    def past(self, request: Request, index: int) -> list[int | None]:
        """What attention finds of a block."""
        block = request.kv.block_table[index]
        if block < KEYS_ALONE:
            return self.content(block)
        assert request.kv.seat is not None and self.host is not None
        return self.host(self.seats[request.kv.seat][index])


HOST = TierInfo("host", 1_000_000, 1, feeds_device=True)
DISK = TierInfo("disk", 1_000_000, 1)


class FakeTiers:
    """Slower tiers without bytes: transfers end when the test says so, well or not.

    Host memory takes `num_slots` payloads, the oldest evicted first. Given a `device`, payloads
    are its blocks' content. A tier has no answer yet for `pending` keys.
    """

    infos = (HOST, DISK)
    may_think = False

    def __init__(self, device: FakeDevice | None = None) -> None:
        self.device = device
        if device is not None:
            device.host = self.slot_content
        self.stored: dict[bytes, str] = {}
        self.payloads: dict[bytes, list[int | None]] = {}
        self.spilling: dict[bytes, int] = {}
        self.discarded: set[bytes] = set()  # of these
        self.fetching: list[tuple[bytes, int]] = []
        self.ended: list[EndedTransfer] = []
        self.has_room = True
        self.num_slots = 1_000_000
        self.kept: Counter[bytes] = Counter()
        self.slots: dict[bytes, int] = {}
        self.pending: set[bytes] = set()

    def locate(self, key: bytes) -> str | None:
        return "host" if key in self.spilling else self.stored.get(key)

    def lookup(
        self, keys: Sequence[bytes], *, may_ask: bool = True, saved_s: float = 0.0
    ) -> list[Found]:
        tiers = {info.name: Found(Answer.HIT, info) for info in self.infos}
        misses = {key: Answer.PENDING if key in self.pending else Answer.MISS for key in keys}
        return [tiers.get(self.locate(key) or "", Found(misses[key])) for key in keys]

    def spill(self, key: bytes, block: int, *, slowest: int | None = None) -> bool:
        if not self.has_room or (self.num_used == self.num_slots and not self._evict()):
            return False
        self.spilling[key] = block
        return True

    def fetch(self, key: bytes, block: int) -> None:
        assert self.locate(key) is not None
        self.fetching.append((key, block))

    def keep(self, key: bytes) -> bool:
        if self.locate(key) != "host":
            return False
        self.kept[key] += 1
        return True

    def host_slot(self, key: bytes) -> int | None:
        if self.stored.get(key) != "host":
            return None
        return self.slots.setdefault(key, len(self.slots))

    def slot_content(self, slot: int) -> list[int | None]:
        [key] = [key for key, number in self.slots.items() if number == slot]
        assert self.stored.get(key) == "host", "a hot request's copy is gone"
        return self.payloads[key]

    def unkeep(self, key: bytes) -> None:
        assert self.kept[key] > 0
        self.kept -= Counter([key])

    @property
    def num_used(self) -> int:
        return len(self.spilling) + sum(place == "host" for place in self.stored.values())

    def num_evictable(self) -> int:
        return self.num_slots - self.num_used + len(self._evictable())

    def discard(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.stored.pop(key, None)
            if key in self.spilling:
                self.discarded.add(key)

    def demote(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if key in self.stored:
                self.stored = {key: self.stored.pop(key), **self.stored}

    def touch(self, keys: Sequence[bytes], *, came_back: bool = False) -> None:
        for key in keys:
            if key in self.stored:
                self.stored[key] = self.stored.pop(key)

    def stage(self, key: bytes) -> bool:
        return False

    def most_staged(self) -> int:
        return self.num_slots

    def queued_fetch_bytes(self) -> int:
        return len(self.fetching)

    def end_spill(self, key: bytes) -> None:
        block = self.spilling.pop(key)
        if key not in self.discarded:
            self.stored[key] = "host"
        self.discarded.discard(key)
        if self.device is not None:
            self.payloads[key] = list(self.device.content(block))
        self.ended.append(EndedTransfer(key, block, is_fetch=False, ok=True))

    def end_fetch(self, index: int = 0, *, ok: bool = True) -> None:
        key, block = self.fetching.pop(index)
        if self.device is not None:
            if key in self.spilling:  # the fetch waits for it
                self.end_spill(key)
            if block & KEYS_ALONE:  # of what is kept, so that it comes
                self.device.write_keys(block ^ KEYS_ALONE, self.payloads[key])
                self.ended.append(EndedTransfer(key, block, is_fetch=True, ok=True))
                return
            self.device.fill(block, self.payloads[key] if ok else None)
        self.ended.append(EndedTransfer(key, block, is_fetch=True, ok=ok))

    def end_all(self) -> None:
        for key in list(self.spilling):
            self.end_spill(key)
        while self.fetching:
            self.end_fetch()

    def poll(self) -> list[EndedTransfer]:
        ended, self.ended = self.ended, []
        return ended

    def _evictable(self) -> list[bytes]:
        in_use = self.kept.keys() | {key for key, _ in self.fetching}
        return [key for key, place in self.stored.items() if place == "host" and key not in in_use]

    def _evict(self) -> bool:
        evictable = self._evictable()
        if evictable:
            del self.stored[evictable[0]]
        return bool(evictable)


class FakeExecutor:
    """Chooses 10 plus the number of tokens that a sequence has; keeps all it was told."""

    vocab_size = 1000
    is_warming = False

    def __init__(self) -> None:
        self.submitted: list[Sequence[StepInput]] = []  # of each step, those of all lanes
        self.released: list[int] = []
        self.copies: list[tuple[int, int]] = []  # that no step made

    def submit(self, steps: Sequence[StepInput], when_ready: Callable[[], None]) -> "FakeExecutor":
        when_ready()
        self.submitted.append(steps)
        return self

    def wait(self) -> StepResult:
        counts = (count for step in self.submitted[-1] for count in step.sample.num_outputs)
        token_ids = [10 + num_outputs for num_outputs in counts]
        return StepResult(token_ids, [None] * len(token_ids), {}, [], 0.01)

    def copy_blocks(self, copies: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.copies += copies[0]

    def validate(self, params: SamplingParams, answers: Sequence[Sequence[int]] = ()) -> None:
        pass

    def release(self, sequence_id: int) -> None:
        self.released.append(sequence_id)

    def warm_up(self) -> bool:
        return False

    def expert_counts(self) -> None:
        pass

    def hot_counts(self) -> None:
        pass

    def take_faults(self) -> Counter[str]:
        return Counter()

    def close(self) -> None:
        pass


class FakeTier:
    """A slower tier in a dictionary. Transfers end at the next `poll`, writes fail if it `is_full`.

    While `is_asking`, it has no answer on any key. If it `declines`, it takes what was used alone.
    """

    def __init__(self, name: str, payload_bytes: int) -> None:
        self.info = TierInfo(name, 100, payload_bytes, patience=1.0)
        self.stored: dict[bytes, bytes] = {}
        self.is_full = self.is_asking = self.declines = False
        self.touched: list[bytes] = []
        self._ended: list[Completion] = []
        self._ids = itertools.count()

    def lookup(self, keys: Sequence[bytes], *, may_ask: bool = True) -> list[Answer]:
        if self.is_asking and may_ask:
            return [Answer.PENDING] * len(keys)
        return [Answer.HIT if key in self.stored else Answer.MISS for key in keys]

    def submit_write(self, key: bytes, payload: memoryview, *, must: bool = False) -> int | None:
        if self.is_full or (self.declines and not must):
            return None
        self.stored[key] = bytes(payload)
        return self._end(key, CompletionStatus.OK)

    def submit_read(self, key: bytes, into: memoryview) -> int:
        if key not in self.stored:
            return self._end(key, CompletionStatus.FAILED)
        into[:] = self.stored[key]
        return self._end(key, CompletionStatus.OK)

    def touch(self, keys: Sequence[bytes], *, came_back: bool = False) -> Sequence[bytes]:
        self.touched += keys
        return [key for key in reversed(keys) if key not in self.stored] if self.declines else ()

    def newest_keys(self, limit: int) -> list[bytes]:
        return list(self.stored)[::-1][:limit]

    def discard(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.stored.pop(key, None)

    def poll(self) -> list[Completion]:
        ended, self._ended = self._ended, []
        return ended

    def wait(self, timeout_s: float) -> None:
        pass

    def usage(self) -> TierUsage:
        return TierUsage(len(self.stored), self.info.capacity_payloads, {})

    def close(self) -> None:
        pass

    def _end(self, key: bytes, status: CompletionStatus) -> int:
        transfer_id = next(self._ids)
        self._ended.append(Completion(transfer_id, key, status))
        return transfer_id


def once(run: Callable[..., T]) -> Callable[..., T]:
    """`run` the first time; later calls return what that one returned."""
    found: list[T] = []

    def run_once(*args: Any, **given: Any) -> T:
        if not found:
            found.append(run(*args, **given))
        return found[0]

    return run_once
