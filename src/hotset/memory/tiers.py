"""The tiers below the device, fastest first, as one thing. Imports no torch."""

import time
from collections.abc import Callable, Iterable, Sequence
from math import inf

from hotset.clock import REAL_CLOCK, Clock
from hotset.cost.rates import Rates
from hotset.errors import OutOfBlocksError
from hotset.eviction import policy_named
from hotset.memory.answers import Answers, wait_for_one
from hotset.memory.journal import Source
from hotset.memory.mover import Batch, Copier, DeviceMemory, HostMemory, Mover
from hotset.memory.residency import Payload, Residency, State
from hotset.memory.slower_tier import SlowerTier
from hotset.memory.tier import (
    Answer,
    CompletionStatus,
    EndedTransfer,
    Found,
    Tier,
    TierInfo,
    TierUsage,
)
from hotset.metrics import Metrics


class TierStack:
    """Host memory, and any number of slower tiers.

    Payloads pass through host slots both ways. A spill goes from the device to host memory, and
    from there to one slower tier after another; a fetch reads the fastest tier that has the
    payload. So a slow or hanging tier holds host slots only, never a device copy. A payload that
    went up to the device, and that a slower tier has too, is the next to leave host memory:
    payloads staged for waiting requests are needed sooner (exclusive caching: Wong and Wilkes,
    "My Cache or Yours?", USENIX ATC 2002).

    All methods are called from the engine thread; none but `wait` and `close` blocks. `flush`,
    once per step, submits the copies asked for since the last one as one batch per direction.

    Args:
        device: the pool that blocks are copied from and to.
        memory: the host slots.
        copier: copies between the two; says how many slots are ready.
        num_slots: that host memory is to have once all are ready.
        rates: to be followed.
        metrics: to be counted in.
        slower: the other tiers, fastest first.
        eviction: of host memory, a name in `eviction`.
        clock: bounds how long a key is PENDING; rates of slower tiers are measured by it.

    Attributes:
        host: which payload is in which host slot.
        mover: copies between device and host memory.
        slower: the other tiers with their transfers, fastest first.
        infos: a row for each tier, fastest first: host memory, then `slower`.
        may_think: whether a tier may answer PENDING.
        is_idle: whether no request waits for what is done here; set by who has them.
        expect: to be told of keys that another replica, at a URL, is said to have; None where none
            is asked.
    """

    def __init__(
        self,
        device: DeviceMemory,
        memory: HostMemory,
        copier: Copier,
        *,
        num_slots: int,
        rates: Rates,
        metrics: Metrics,
        slower: Sequence[Tier] = (),
        eviction: str = "lru",
        clock: Clock = REAL_CLOCK,
    ) -> None:
        host_info = TierInfo("host", num_slots, memory.slot_bytes, feeds_device=True)
        self.infos = [host_info, *(tier.info for tier in slower)]
        self.may_think = any(info.patience is not None for info in self.infos)
        order = policy_named(eviction).order()
        self.host = Residency(0, lambda key: order)
        self.mover: Mover[Payload] = Mover(
            copier, block_runs=device.runs, slot_address=memory.address
        )
        self.slower = [
            SlowerTier(tier, host_info.name, device.block_bytes, rates, metrics, clock)
            for tier in slower
        ]
        self.is_idle = True
        self.expect: Callable[[Sequence[bytes], str], None] | None = None
        self.block_bytes = device.block_bytes
        self.rates = rates
        self.metrics = metrics
        self._memory = memory
        self._answers = Answers(self.host, self.infos, self.slower, clock)
        self._ended: list[EndedTransfer] = []
        self._num_fetching = 0
        self._grow()

    # Where payloads are

    def lookup(
        self, keys: Sequence[bytes], *, may_ask: bool = True, saved_s: float = inf
    ) -> list[Found]:
        """Which tier has each payload, or will have shortly.

        PENDING is answered for a bounded time: ask again then, and MISS takes its place at last.
        That is as long as the tier's `patience` says of `saved_s`, which it takes to do without
        these payloads, and at most 0.25 seconds. Where they may not ask elsewhere, tiers do not
        answer PENDING.
        """
        return self._answers.lookup(keys, may_ask=may_ask, saved_s=saved_s)

    def sources(self) -> dict[str, Source]:
        """The tiers by their names, for a journal."""
        slower = {slower.tier.info.name: slower for slower in self.slower}
        return {self.infos[0].name: self.host, **slower}

    def usage(self) -> list[TierUsage]:
        """What each of `infos` holds now."""
        host = TierUsage(self.host.num_used, self.host.num_slots, {}, self.host.states())
        return [host, *(slower.tier.usage() for slower in self.slower)]

    def num_evictable(self) -> int:
        """Payloads that host memory can take beside what is kept and what is being moved.

        Some slots stay for what comes from slower tiers.
        """
        num_passing = 1 + self.host.num_slots // 8 if self.slower else 0
        return self.host.num_evictable - num_passing

    def most_staged(self) -> int:
        """Payloads that may be brought ahead of a fetch, so that none pushes others out.

        Half of host memory: the other half is for what comes down meanwhile.
        """
        return self.host.num_slots // 2

    def queued_fetch_bytes(self) -> int:
        """Bytes asked for by `fetch` that have not arrived."""
        return self._num_fetching * self.block_bytes

    # What the KV cache asks for

    def spill(self, key: bytes, block: int, *, slowest: int | None = None) -> bool:
        """Copy `block` down with the next `flush`; False where host memory has no room.

        Its content must stay still until `poll` tells the end. It goes to no slower tier than
        number `slowest`, 0 being host memory; None is all of them.
        """
        payload = self.host.get(key)
        if payload is not None and (payload.state is State.LATE or payload.is_dropped):
            return False
        try:
            payload = self.host.reserve(key, State.SPILLING)
        except OutOfBlocksError:
            self.metrics.faults["host_full"] += 1
            return False
        payload.slowest = slowest
        self.mover.queue(payload, block, payload.slot, to_host=True)
        return True

    def fetch(self, key: bytes, block: int) -> None:
        """Copy the payload of `key` into `block`, from wherever it is; `poll` tells the end.

        The block must stay untouched meanwhile.
        """
        self._num_fetching += 1
        is_coming = self.stage(key)
        payload = self.host.get(key)
        if payload is None or not is_coming:
            self._end_fetch(key, block, ok=False)
        elif payload.is_ready:
            self.host.pin(payload)
            self.mover.queue(payload, block, payload.slot, to_host=False)
        else:
            payload.wanted_by.append(block)

    def stage(self, key: bytes) -> bool:
        """Start bringing `key` from a slower tier into host memory, ahead of a fetch.

        Returns whether it is on its way there, or there already.
        """
        payload = self.host.get(key)
        if payload is not None:
            return payload.state is not State.LATE
        for number, slower in enumerate(self.slower, start=1):
            if slower.has(key):
                return self.read(key, number)
        return False

    def keep(self, key: bytes) -> bool:
        """Hold the payload of `key` in host memory until `unkeep`.

        False where it is not there, or would leave too few slots for what passes through.
        """
        payload = self.host.get(key)
        if payload is None or payload.state not in (State.READY, State.SPILLING):
            return False
        if not payload.is_in_use and self.num_evictable() <= 0:
            return False
        self.host.pin(payload)
        return True

    def host_slot(self, key: bytes) -> int | None:
        """The slot of host memory that holds the payload of `key`; None where none does."""
        payload = self.host.get(key)
        return payload.slot if payload is not None and payload.is_ready else None

    def copy_out(self, key: bytes, into: memoryview) -> bool:
        """Copy the payload of `key` out of host memory; False where it is not there whole.

        From any thread: a slot gets other content only after the record of its payload is gone, so
        one that is there before and after the copy had it all the while.
        """
        payload = self.host.get(key)
        if payload is None or not payload.is_ready:
            return False
        into[:] = self._memory.view(payload.slot)
        return self.host.get(key) is payload and not payload.is_dropped

    def unkeep(self, key: bytes) -> None:
        """Undo one `keep`."""
        payload = self.host.get(key)
        assert payload is not None, "what was kept is gone"
        self.host.unpin(payload)

    def discard(self, keys: Sequence[bytes]) -> None:
        """Forget payloads in all tiers, at once or as soon as no copy uses them."""
        for key in keys:
            payload = self.host.get(key)
            if payload is not None:
                self.host.drop(payload)
                payload.slowest = 0  # what is still on its way down ends there
        for slower in self.slower:
            slower.tier.discard(keys)

    def touch(self, keys: Sequence[bytes], *, came_back: bool = False) -> None:
        """Mark payloads as just used, in the slower tiers, or in host memory where it is alone.

        They are of one conversation, its last one first; `came_back`: a later request found them.
        """
        for slower in self.slower:
            slower.owe(slower.tier.touch(keys, came_back=came_back))
        alone = keys
        for slower in self.slower:
            answers = slower.tier.lookup(alone, may_ask=False)
            alone = [key for key, one in zip(alone, answers, strict=True) if one is not Answer.HIT]
        for key in alone:
            self.host.touch(key)

    def demote(self, keys: Sequence[bytes]) -> None:
        """Have payloads leave host memory first that may be evicted."""
        for key in keys:
            self.host.demote(key)

    def begin_drain(self, first: Sequence[bytes] = ()) -> None:
        """Have the slowest tier get all that host memory has, as the process ends soon.

        With `poll`, until `num_to_drain` is 0: `first`, then what was used last. Nothing that may
        not go there: see `spill`. May be called again, for another order.
        """
        if self.slower:
            number = len(self.slower)
            ours = [p.key for p in self.host.by_use() if p.slowest is None or p.slowest >= number]
            self.slower[-1].owed.clear()
            self.slower[-1].owe([*first, *ours], at_once=True)

    @property
    def num_to_drain(self) -> int:
        """Payloads that are still to be written to the slowest tier."""
        return len(self.slower[-1].owed) + len(self.slower[-1].writes) if self.slower else 0

    # The engine's step

    @property
    def is_busy(self) -> bool:
        """Whether copies, reads or writes are under way, or a tier is still to answer."""
        return (
            self.mover.is_busy
            or bool(self._ended)
            or any(slower.is_busy for slower in self.slower)
            or self._answers.any_left
        )

    def mark(self) -> None:
        """Note the compute submitted so far, for `flush`."""
        self.mover.copier.mark()

    def flush(self, *, after_mark: bool = False, most_s: float | None = None) -> None:
        """Submit the copies asked for since the last call.

        Args:
            after_mark: whether they may overtake compute that was submitted since `mark`.
            most_s: submit no more fetches than the link moves in this time, one at least; the
                others go with the next calls. None is all.
        """
        if not after_mark:
            self.mark()
        most_up = None
        if most_s is not None:
            link_bytes = self.rates.link_bytes_per_s[self.infos[0].name] * most_s
            most_up = 1 + int(link_bytes / self.block_bytes)
        self.mover.flush(most_up=most_up)

    def poll(self) -> list[EndedTransfer]:
        """What ended since the last call: spills, and fetches with their outcome.

        Fetches that a `flush` has bounded by a time have ended, too, if what is computed from here
        on can wait for them on the device.
        """
        self._grow()
        self._answers.begin_round()
        self.poll_slower()
        for batch, seconds in self.mover.poll():
            self._end_batch(batch, seconds)
        for batch in self.mover.order():
            self._arrive(batch)
        ended, self._ended = self._ended, []
        return ended

    def wait(self, timeout_s: float) -> None:
        """Block until something may have ended or be answered, or `timeout_s` has passed."""
        timeout_s = min(timeout_s, self._answers.left_s)
        is_thinking = self._answers.is_thinking
        busy = [one for one in self.slower if one.is_busy or is_thinking(one)] or self.slower
        if self.mover.is_copying or not busy:
            self.mover.copier.wait(timeout_s)
            return
        wait_for_one(busy, timeout_s)

    def await_answers(self, are_open: Callable[[], bool], most_s: float) -> None:
        """Block until nothing is PENDING of what `are_open` looks up, or `most_s` has passed."""
        until_s = time.monotonic() + most_s
        while True:
            self._answers.begin_round()
            if not are_open() or (left_s := until_s - time.monotonic()) <= 0:
                return
            self._answers.wait(min(left_s, self._answers.left_s))
            self.poll_slower()

    def close(self) -> None:
        """End the copies, then the slower tiers."""
        self.mover.copier.close()
        for slower in self.slower:
            slower.tier.close()

    # Between host memory and slower tiers

    def read(self, key: bytes, number: int) -> bool:
        """Start reading a payload from tier `number`; False where host memory has no room."""
        try:
            payload = self.host.reserve(key, State.READING)
        except OutOfBlocksError:
            return False
        payload.source = number
        self.slower[number - 1].read(payload, self._memory.view(payload.slot))
        return True

    def write(self, payload: Payload, number: int) -> bool:
        """Start writing a READY payload to tier `number`; False where that drops it."""
        self.host.pin(payload)
        if self.slower[number - 1].write(payload, self._memory.view(payload.slot)):
            return True
        self.host.unpin(payload)
        return False

    def poll_slower(self) -> None:
        """Take note of reads and writes that ended, or are late."""
        for number, slower in enumerate(self.slower, start=1):
            for payload, completion, is_read in slower.poll():
                if completion.status is CompletionStatus.LATE:
                    # The slot stays with the tier until the read ends; no fetch waits for it.
                    payload.state = State.LATE
                    blocks, payload.wanted_by = payload.wanted_by, []
                    self._fail(payload.key, blocks)
                elif not is_read:
                    self._cascade(payload, number + 1)
                    self.host.unpin(payload)
                elif completion.status is CompletionStatus.OK:
                    self._become_ready(payload)
                else:
                    self._fail(payload.key, self.host.abandon(payload))
            for payload in slower.due(self.host, is_idle=self.is_idle):
                self.write(payload, number)  # or it is dropped

    def _cascade(self, payload: Payload, number: int) -> None:
        """Write a READY payload to the first tier from `number` on that lacks it and takes it."""
        for later, slower in enumerate(self.slower[: payload.slowest][number - 1 :], start=number):
            if not slower.has(payload.key) and self.write(payload, later):
                return

    def _become_ready(self, payload: Payload) -> None:
        """A host slot is filled: start the fetches that waited for it."""
        for block in self.host.become_ready(payload):
            self.mover.queue(payload, block, payload.slot, to_host=False)

    # Between the device and host memory

    def _grow(self) -> None:
        num_ready = self.mover.copier.num_ready_slots
        if num_ready > self.host.num_slots:
            self.host.grow(num_ready)

    def _end_batch(self, batch: Batch[Payload], seconds: float) -> None:
        host = self.infos[0].name
        num_bytes = batch.num_bytes
        if batch.to_host:
            self.metrics.moved_bytes[f"device>{host}"] += num_bytes
            for move in batch.moves:
                payload = move.owner
                self._ended.append(EndedTransfer(payload.key, move.block, is_fetch=False, ok=True))
                self._become_ready(payload)
                self._cascade(payload, 1)
            return
        self.metrics.moved_bytes[f"{host}>device"] += num_bytes
        self.rates.observe_link(host, num_bytes, seconds)
        for move in batch.moves:
            self.host.unpin(move.owner)
            if any(slower.has(move.owner.key) for slower in self.slower):
                self.host.demote(move.owner.key)
        if not batch.has_arrived:
            self._arrive(batch)

    def _arrive(self, batch: Batch[Payload]) -> None:
        batch.has_arrived = True
        for move in batch.moves:
            self._end_fetch(move.owner.key, move.block, ok=True)

    def _fail(self, key: bytes, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._end_fetch(key, block, ok=False)

    def _end_fetch(self, key: bytes, block: int, *, ok: bool) -> None:
        self._num_fetching -= 1
        self._ended.append(EndedTransfer(key, block, is_fetch=True, ok=ok))

    def check(self) -> None:
        """Assert that host memory is consistent and that every filling slot is being filled."""
        self.host.check()
        reads = [payload for slower in self.slower for payload in slower.reads.values()]
        coming = {payload.key for payload in [*self.mover.moving_down(), *reads]}
        assert coming == self.host.filling(), "a host slot waits for nothing"
        for slower in self.slower:
            assert all(payload.pins > 0 for payload in slower.writes.values())
