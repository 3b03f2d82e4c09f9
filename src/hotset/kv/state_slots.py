"""Which slot of the device has the state of which sequence. Knows numbers, no tensors.

Imports no torch.
"""

from hotset.kv.pool import BlockPool
from hotset.sequence import PADDING_SLOT, ZEROS_SLOT, Request

_FIRST = PADDING_SLOT + 1  # slots below are reserved


class StateSlots:
    """Gives each request that runs a slot for its state.

    A request reads one slot in a step and writes to one. The first time it reads zeros; from then
    on both are its own.

    Args:
        num_slots: beside the two that are reserved.

    Attributes:
        pool: of the slots, without those that are reserved.
    """

    def __init__(self, num_slots: int) -> None:
        self.pool = BlockPool(num_slots)

    @property
    def num_available(self) -> int:
        """Slots that can be had."""
        return self.pool.num_available

    def give(self, request: Request) -> None:
        """Let a request that has none start from zeros, in a slot of its own."""
        assert request.kv.state_write == PADDING_SLOT, "a request has a slot already"
        [slot] = self.pool.allocate(1)
        request.kv.state_read, request.kv.state_write = ZEROS_SLOT, slot + _FIRST

    def advance(self, request: Request) -> None:
        """Note that a step wrote the request's state."""
        request.kv.state_read = request.kv.state_write

    def take_back(self, request: Request) -> None:
        """Take the slot of a request that does not run; its state is lost."""
        if request.kv.state_write != PADDING_SLOT:
            self.pool.release(request.kv.state_write - _FIRST)
        request.kv.state_read, request.kv.state_write = ZEROS_SLOT, PADDING_SLOT
