"""Which requests are hot, and what of their tokens leaves the device for it. Imports no torch.

A hot request has its tokens in host memory, those that were used last in slots on the device too,
and on the device alone what is not copied down yet: its last, partial block at least. The index
keys of all its tokens stay on the device, as each step reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from hotset.kv.seats import DeviceBlock, HostSlot, Seat, Seats, SeatUpdates, SlotBlock
from hotset.kv.table import BlockTables
from hotset.kv.transfers import BlockTransfers
from hotset.metrics import Metrics
from hotset.sequence import Kind, Request


@dataclass(slots=True)
class _Hot:
    """A hot request.

    Attributes:
        staying: indices of full blocks that are on the device still.
        num_seen: full blocks that were looked at.
    """

    request: Request
    seat: Seat
    staying: list[int]
    num_seen: int


class HotSet:
    """Turns requests hot, and lets go of their blocks as host memory has copies.

    A request is hot from `turn_hot` to `leave`, and again from `go_on` on if it was preempted.
    Meanwhile what it has in host memory is kept there.
    A shared block is given back like others: those that share it go on as before.

    Args:
        seats: a row for each hot request.
        tables: the blocks of each request.
        transfers: of blocks, to and from host memory.
        metrics: to be counted in.
    """

    def __init__(
        self, seats: Seats, tables: BlockTables, transfers: BlockTransfers, metrics: Metrics
    ) -> None:
        self._seats, self._tables, self._transfers = seats, tables, transfers
        self._metrics = metrics
        self._hot: dict[int, _Hot] = {}  # by sequence id

    @property
    def num_hot(self) -> int:
        """Requests that are hot now."""
        return len(self._hot)

    def most_freed(self, request: Request) -> int:
        """The most blocks that a running request can give back by turning hot; 0: it cannot.

        Only one that decodes, that has more tokens than slots, and that shares no prompt with other
        outputs of the same request.
        """
        if request.kv.seat is not None or not self._seats.num_free or request.params.n > 1:
            return 0
        if request.kind is not Kind.DECODE:
            return 0
        return self._num_freed(request, self._num_full(request))

    def make_room(self, running: Sequence[Request], num_blocks: int) -> bool:
        """Turn requests hot until they gave back `num_blocks`, first those that free most.

        Returns whether any turned; none does where all together have too few blocks.
        """
        most = [(self.most_freed(request), request) for request in running]
        most = sorted((one for one in most if one[0]), key=itemgetter(0), reverse=True)
        if num_blocks <= 0 or sum(count for count, _ in most) < num_blocks:
            return False
        num_freed = 0
        for _, request in most:
            if num_freed < num_blocks:
                num_freed += self.turn_hot(request)
        return num_freed > 0

    def turn_hot(self, request: Request) -> int:
        """Turn a running request hot, if that gives back blocks; returns how many.

        0, with nothing changed, where too few of its blocks are its own and in host memory, or host
        memory cannot keep what it will have at its end. Its newest blocks stay where they are, as
        its slots.
        """
        if not self.most_freed(request):
            return 0
        kv, pool = request.kv, self._tables.pool
        own = [
            index
            for index in range(self._num_full(request))
            if pool.ref_count(kv.block_table[index]) == 1
            and self._transfers.host_slot(kv.block_hashes[index]) is not None
        ]
        num_freed = self._num_freed(request, len(own))
        if num_freed <= 0 or not self._transfers.can_take(self._num_left_at_end(request)):
            return 0
        slots = own[-self._seats.blocks_per_seat :]
        seat = self._seats.take([self._slot_block(request, index) for index in slots])
        kv.seat, kv.slot_blocks = seat.number, list(seat.slot_blocks)
        for block in kv.slot_blocks:
            pool.unpublish(block)  # as slots they are written to
            pool.hold(block)  # released below as blocks of the table
        hot = self._hot[request.sequence_id] = _Hot(request, seat, [], 0)
        self._let_go(hot)
        self._metrics.turned_hot += 1
        return num_freed

    def blocks_to_go_on(self, request: Request) -> int | None:
        """Blocks of the pool with which a preempted request goes on as a hot one.

        None where it cannot: it was not hot, there is no seat, host memory does not keep all of it
        and room for the rest, or it would take as many as a resident one.
        """
        kv, index_blocks = request.kv, self._tables.index_blocks
        if not kv.was_hot or not self._seats.num_free:
            return None
        assert index_blocks is not None
        num_full, num_partial = divmod(request.num_tokens - 1, self._tables.block_size)
        keys = kv.block_hashes[:num_full]
        if num_partial:
            tail = kv.resume
            if tail is None or (tail.index, tail.num_tokens) != (num_full, num_partial):
                return None
            keys.append(tail.key)
        if len(keys) < num_full + bool(num_partial) or not set(keys).issubset(kv.kept):
            return None
        if not self._transfers.can_take(self._num_left_at_end(request) - num_full):
            return None
        num_slot_blocks = self._seats.blocks_per_seat  # which keep index keys too
        num_lacking = max(0, num_full - num_slot_blocks - index_blocks.num_free)
        num_carved = -(-num_lacking // index_blocks.fewest_per_block)
        num_blocks = num_slot_blocks + num_carved + bool(num_partial)
        return num_blocks if num_blocks < len(keys) else None

    def go_on(self, request: Request) -> bool:
        """Have a preempted request, with room for `blocks_to_go_on`, go on as a hot one.

        Its slots are empty. Of its full blocks index keys alone come to the device. False, with
        nothing changed, while copies to host memory are under way.
        """
        kv, index_blocks, pool = request.kv, self._tables.index_blocks, self._tables.pool
        assert index_blocks is not None
        num_full, num_partial = divmod(request.num_tokens - 1, self._tables.block_size)
        slots = list(map(self._transfers.host_slot, kv.block_hashes[:num_full]))
        if None in slots:
            return False
        kv.slot_blocks = pool.allocate(self._seats.blocks_per_seat)
        empty = [SlotBlock(DeviceBlock(block), None) for block in kv.slot_blocks]
        seat = self._seats.take(empty)
        kv.seat, kv.num_shared_blocks = seat.number, 0
        kv.block_table = list(map(index_blocks.keep_own, kv.slot_blocks))
        kv.block_table += [index_blocks.take() for _ in slots[len(kv.slot_blocks) :]]
        kv.num_index_blocks = num_full
        for index, slot in enumerate(slots):
            assert slot is not None
            self._seats.place(seat, index, HostSlot(slot))
            self._transfers.bring_index_keys(request, index)
        if num_partial:
            self._transfers.bring_tail(request)
        self._hot[request.sequence_id] = _Hot(request, seat, [], num_full)
        return True

    def settle(self) -> None:
        """Let go of what was copied down since the last call; what was not is asked for again."""
        for hot in self._hot.values():
            if hot.staying or hot.num_seen < self._num_full(hot.request):
                self._let_go(hot)

    def leave(self, request: Request) -> None:
        """A request is hot no longer: its slots and its seat are free. What is kept stays kept."""
        hot = self._hot.pop(request.sequence_id, None)
        if hot is None:
            return
        for block in self._seats.leave(hot.seat):
            self._tables.pool.release(block)
        request.kv.slot_blocks, request.kv.seat = [], None

    def forget_slots(self) -> None:
        """A step did not run to its end: nothing that a slot holds can be relied on."""
        self._seats.forget_slots()

    def take_updates(self) -> SeatUpdates:
        """What the device's tables lack before the next step."""
        return self._seats.take_updates()

    def _num_full(self, request: Request) -> int:
        return request.kv.num_computed_tokens // self._tables.block_size

    def _num_freed(self, request: Request, num_own: int) -> int:
        """Blocks that come back where `num_own` can leave: without slots, and index keys of all."""
        index_blocks = self._tables.index_blocks
        assert index_blocks is not None
        num_slot_blocks = self._seats.blocks_per_seat  # which keep index keys too
        num_others = self._num_full(request) - num_slot_blocks
        return max(0, num_own - num_slot_blocks + -num_others // index_blocks.fewest_per_block)

    def _num_left_at_end(self, newcomer: Request) -> int:
        """Blocks that `newcomer` leaves to host memory, and hot requests beside what they have."""
        requests = [newcomer, *(hot.request for hot in self._hot.values())]
        return sum(
            self._tables.num_blocks_for(one.max_total_tokens) - one.kv.num_index_blocks
            for one in requests
        )

    def _slot_block(self, request: Request, index: int) -> SlotBlock:
        block = DeviceBlock(request.kv.block_table[index])
        return SlotBlock(block, index * self._tables.block_size)

    def _let_go(self, hot: _Hot) -> None:
        """Give back the full blocks that host memory has, and ask for copies of the others."""
        kv, num_full = hot.request.kv, self._num_full(hot.request)
        indices = [*hot.staying, *range(hot.num_seen, num_full)]
        hot.staying, hot.num_seen = [], num_full
        for index in indices:
            slot = None
            if self._tables.can_keep_index_keys(hot.request, index):
                slot = self._transfers.keep_slot(hot.request, index)
            if slot is None:
                hot.staying.append(index)
                continue
            self._seats.place(hot.seat, index, HostSlot(slot))
            self._tables.keep_index_keys(hot.request, index)
        for index in hot.staying:  # after all that host memory has is kept there
            self._transfers.bring_down(kv.block_hashes[index], kv.block_table[index])

    def check(self) -> None:
        """Assert that seats, tables and the pool agree."""
        self._seats.check()
        index_blocks = self._tables.index_blocks
        assert index_blocks is not None
        index_blocks.check()
        num_own = sum(hot.request.kv.num_index_blocks for hot in self._hot.values())
        assert index_blocks.num_used == num_own + self._transfers.num_index_blocks_left
        assert self._seats.num_taken == len(self._hot)
        for hot in self._hot.values():
            kv, seat = hot.request.kv, hot.seat
            assert kv.seat == seat.number and kv.slot_blocks == seat.slot_blocks
            is_whole = self._tables.is_whole
            in_host = {i for i, block in enumerate(kv.block_table) if not is_whole(block)}
            assert in_host == seat.host.keys() and len(in_host) == kv.num_index_blocks
            for index, slot in seat.host.items():
                assert self._transfers.host_slot(kv.block_hashes[index]) == slot
            assert all(self._tables.pool.ref_count(b) == 1 for b in kv.slot_blocks)
            assert not set(kv.slot_blocks) & set(kv.block_table)
