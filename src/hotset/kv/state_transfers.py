"""States on their way between slots of the device and slower tiers. Imports no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from hotset.kv.block_hash import piece_key
from hotset.kv.state_slots import StateSlots
from hotset.memory.state_pieces import StatePieces
from hotset.memory.tier import Answer, EndedTransfer, Found, TierInfo
from hotset.memory.tiers import TierStack
from hotset.metrics import Metrics
from hotset.sequence import Request


@dataclass(slots=True)
class _Load:
    """A state on its way to a slot, and the requests that wait for it.

    Attributes:
        key: under which it is found once it is there; None where one request goes on in it.
        num_left: pieces that have not come.
    """

    key: bytes | None
    num_left: int
    waiters: list[Request] = field(default_factory=list)
    ok: bool = True


class StateTransfers:
    """Moves states as payloads of one block's size, and holds their slots until that has ended.

    A state is in the tiers if all of its pieces are. It is loaded once, however many requests wait
    for it, as long as there are slots for it and for them.

    Args:
        slots: of the device.
        pieces: their numbers.
        tiers: below the device.
        metrics: to be counted in.
    """

    def __init__(
        self, slots: StateSlots, pieces: StatePieces, tiers: TierStack, metrics: Metrics
    ) -> None:
        self._slots, self._pieces, self._tiers = slots, pieces, tiers
        self._metrics = metrics
        self._loads: dict[int, _Load] = {}  # by slot
        self._slot_of: dict[bytes, int] = {}  # of states that will be found
        self._spilling: Counter[int] = Counter()  # pieces on their way down, by slot

    @property
    def num_spilling(self) -> int:
        """Slots that are being copied down."""
        return len(self._spilling)

    @property
    def infos(self) -> Sequence[TierInfo]:
        """The tiers, fastest first."""
        return self._tiers.infos

    @property
    def num_pieces(self) -> int:
        """Payloads of a state."""
        return self._pieces.per_state

    def keys(self, key: bytes) -> list[bytes]:
        """Keys of the pieces of a state."""
        return [piece_key(key, i) for i in range(self._pieces.per_state)]

    def lookup(
        self, keys: Sequence[bytes], *, may_ask: bool = True, saved_s: float = inf
    ) -> list[Found]:
        """What the tiers have of each state: a HIT is in the slowest tier that has a piece."""
        firsts = self.first_pieces(keys, may_ask=may_ask, saved_s=saved_s)
        return [
            self._whole(key, may_ask, saved_s) if first.answer is Answer.HIT else first
            for key, first in zip(keys, firsts, strict=True)
        ]

    def first_pieces(
        self, keys: Sequence[bytes], *, may_ask: bool = True, saved_s: float = inf
    ) -> list[Found]:
        """What the tiers have of the first piece of each state: without it there is none."""
        firsts = [piece_key(key, 0) for key in keys]
        return self._tiers.lookup(firsts, may_ask=may_ask, saved_s=saved_s)

    def _whole(self, key: bytes, may_ask: bool, saved_s: float) -> Found:
        found = self._tiers.lookup(self.keys(key), may_ask=may_ask, saved_s=saved_s)
        for answer in (Answer.MISS, Answer.PENDING):
            if any(one.answer is answer for one in found):
                return Found(answer)
        return max(found, key=lambda one: self.number_of(one.tier))

    def number_of(self, tier: TierInfo | None) -> int:
        """The number of a tier, host memory's being 0."""
        assert tier is not None
        return self._tiers.infos.index(tier)

    def load(self, request: Request, key: bytes, *, is_own: bool) -> None:
        """Bring a state for a request that has no slot, which goes on from it once it is there.

        Others will find it too, unless it is the request's own, or there is one slot alone.
        """
        slot = self._slot_of.get(key)
        if slot is None:
            is_found = not is_own and self._slots.pool.num_available > 1
            slot = self._fetch(key, is_found=is_found)
        self._slots.start_from(request, slot, is_found=self._loads[slot].key is not None)
        self._loads[slot].waiters.append(request)

    def _fetch(self, key: bytes, *, is_found: bool) -> int:
        slot = self._slots.take()
        self._loads[slot] = _Load(key if is_found else None, self._pieces.per_state)
        if is_found:
            self._slot_of[key] = slot
        for piece, number in zip(self.keys(key), self._pieces.of_slot(slot), strict=True):
            self._tiers.fetch(piece, number)
        return slot

    def stop_waiting(self, request: Request) -> None:
        """Forget that a request waits; its load goes on."""
        for load in self._loads.values():
            if request in load.waiters:
                load.waiters.remove(request)

    def stage(self, key: bytes) -> None:
        """Bring a state closer, into host memory."""
        for piece in self.keys(key):
            self._tiers.stage(piece)

    def spill(self, key: bytes, slot: int, *, slowest: int) -> bool:
        """Copy the state of a held or findable slot down; False where host memory has no room.

        Args:
            key: that it gets.
            slot: not written to until the copy has ended.
            slowest: the number of the slowest tier that it goes to.
        """
        keys = self.keys(key)
        known = self._tiers.lookup(keys, may_ask=False)
        missing = [
            (piece, number)
            for piece, number, found in zip(keys, self._pieces.of_slot(slot), known, strict=True)
            if found.answer is not Answer.HIT
        ]
        for count, (piece, number) in enumerate(missing):
            if not self._tiers.spill(piece, number, slowest=slowest):
                self._tiers.discard([other for other, _ in missing[:count]])
                return False
            self._slots.hold(slot)  # once per piece, until its copy ends
            self._spilling[slot] += 1
        self._metrics.spilled_states += bool(missing)
        return True

    def demote(self, key: bytes) -> None:
        """Have a state leave host memory before others."""
        self._tiers.demote(self.keys(key))

    def discard(self, key: bytes) -> None:
        """Forget a state in the tiers."""
        self._tiers.discard(self.keys(key))

    def is_piece(self, number: int) -> bool:
        """Whether a transfer with this number in place of a block was one of a state."""
        return number >= self._pieces.first

    def end(self, ended: EndedTransfer) -> None:
        """Take note of the transfer of a piece that ended."""
        slot = (ended.block - self._pieces.first) // self._pieces.per_state
        if not ended.is_fetch:
            self._spilling -= Counter([slot])
            self._slots.release(slot)
            return
        load = self._loads[slot]
        load.num_left -= 1
        load.ok &= ended.ok
        if load.num_left:
            return
        del self._loads[slot]
        if load.key is not None:
            del self._slot_of[load.key]
            if load.ok:
                self._slots.publish(slot, load.key)
        self._metrics.fetched_states += load.ok
        self._metrics.faults["state_lost"] += not load.ok
        for request in load.waiters:
            assert request.kv.awaited is not None
            request.kv.awaited.is_arriving, request.kv.awaited.has_failed = False, not load.ok
        self._slots.release(slot)

    def check(self) -> None:
        """Assert that loads, their waiters and the slots agree."""
        for slot, load in self._loads.items():
            assert self._slots.is_held(slot), "a slot that is being filled is not held"
            for request in load.waiters:
                assert request.kv.state_read == slot, "a request waits for another slot"
                assert request.kv.awaited is not None and request.kv.awaited.is_arriving
        assert all(count > 0 for count in self._spilling.values())
        assert all(self._slots.is_held(slot) for slot in self._spilling)
