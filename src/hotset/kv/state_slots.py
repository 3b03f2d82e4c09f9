"""Which slot of the device has the state of which sequence, and which states are kept for others.

Knows numbers and keys, no tensors. Imports no torch.
"""

from collections.abc import Iterable

from hotset.kv.pool import BlockPool
from hotset.sequence import PADDING_SLOT, ZEROS_SLOT, Request, StateCut

_FIRST = PADDING_SLOT + 1  # slots below are reserved


class StateSlots:
    """Gives each request that runs a slot for its state, and finds states that were kept.

    A request reads one slot in a step and writes to one. At first it reads zeros, or a state that
    was kept after the tokens that it begins with; from then on both are its own. A slot that others
    hold or can find is never written to. A state is kept in two ways: a step writes it to another
    slot on its way (`cut`), or a request leaves its own when it ends (`leave`).

    Args:
        num_slots: beside the two that are reserved.
        grid: states are kept after multiples of this many tokens, and at a request's end.

    Attributes:
        pool: of the slots, without those that are reserved. A state has the key of the block of KV
            that ends where it is.
    """

    def __init__(self, num_slots: int, *, grid: int = 1) -> None:
        self.pool = BlockPool(num_slots)
        self.grid = grid

    @property
    def can_give(self) -> bool:
        """Whether there is a slot for one more request."""
        return self.pool.num_available > 0

    def give(self, request: Request, key: bytes | None) -> None:
        """Let a request that has no slot start from the state with this key; None: from zeros.

        Where there is just one slot to be had and it has that state, the request goes on in it.
        """
        kv, pool = request.kv, self.pool
        assert kv.state_write == PADDING_SLOT, "a request has a slot already"
        slot = None if key is None else pool.acquire(key)
        if slot is not None and key is not None and not pool.num_available:
            pool.unpublish(slot)
            kv.state_read = kv.state_write = slot + _FIRST
            return
        kv.state_read = ZEROS_SLOT if slot is None else slot + _FIRST
        kv.state_write = self.take()

    def take(self) -> int:
        """A slot that is held once, for a state that comes from elsewhere."""
        return self.pool.allocate(1)[0] + _FIRST

    def start_from(self, request: Request, slot: int, *, is_found: bool) -> None:
        """Let a request that has no slot start from the state that comes to `slot`.

        Where others will find it, the request goes on in a slot of its own.
        """
        assert request.kv.state_write == PADDING_SLOT, "a request has a slot already"
        self.hold(slot)
        request.kv.state_read = slot
        request.kv.state_write = self.take() if is_found else slot

    def find(self, key: bytes) -> int | None:
        """The slot of a state that was kept."""
        slot = self.pool.lookup(key)
        return None if slot is None else slot + _FIRST

    def is_held(self, slot: int) -> bool:
        """Whether a request or a transfer holds a slot."""
        return self.pool.ref_count(slot - _FIRST) > 0

    def hold(self, slot: int) -> None:
        """Add a holder to a slot that is held or findable."""
        self.pool.hold(slot - _FIRST)

    def release(self, slot: int) -> None:
        """One holder less."""
        self.pool.release(slot - _FIRST)

    def publish(self, slot: int, key: bytes) -> None:
        """Have the state of a held slot found."""
        self.pool.publish(slot - _FIRST, key)

    def fork(self, parent: Request, child: Request) -> None:
        """Let `child` start from what was kept for it within the last step of `parent`."""
        assert parent.kv.fork_slot is not None
        self.hold(parent.kv.fork_slot)
        child.kv.state_read = parent.kv.fork_slot
        child.kv.state_write = self.take()

    def end_fork(self, request: Request) -> None:
        """No more requests start from what was kept for them."""
        if request.kv.fork_slot is not None:
            self.release(request.kv.fork_slot)
            request.kv.fork_slot = None

    def cut(self, request: Request, position: int, key: bytes | None) -> bool:
        """Have the next step keep the state after `position` tokens, unless there is one already.

        Under this key; None keeps it for those that fork. False where no slot is to be had.
        """
        if key is not None and self.pool.lookup(key) is not None:
            return True
        if not self.pool.num_available:
            return False
        request.kv.cuts.append(StateCut(position, self.take(), key))
        return True

    def advance(self, request: Request) -> None:
        """Note that a step wrote the request's state, and what was to be kept."""
        kv = request.kv
        if kv.state_read != kv.state_write:
            self._release([kv.state_read])
            kv.state_read = kv.state_write
        for cut in kv.cuts:
            if cut.key is None:
                kv.fork_slot = cut.slot
            else:
                self.publish(cut.slot, cut.key)
                self._release([cut.slot])
        kv.cuts = []

    def leave(self, request: Request, key: bytes) -> bool:
        """Have the state of a request that ends found after its last token; whether it has one."""
        has_state = request.kv.state_read == request.kv.state_write != PADDING_SLOT
        if has_state:
            self.publish(request.kv.state_write, key)
        return has_state

    def take_back(self, request: Request) -> None:
        """Take the slots of a request that does not run; what it has not left is lost."""
        kv = request.kv
        self.end_fork(request)
        self._release({kv.state_read, kv.state_write, *(cut.slot for cut in kv.cuts)})
        kv.state_read, kv.state_write = ZEROS_SLOT, PADDING_SLOT
        kv.cuts, kv.num_planned = [], 0

    def _release(self, slots: Iterable[int]) -> None:
        for slot in slots:
            if slot >= _FIRST:
                self.release(slot)
