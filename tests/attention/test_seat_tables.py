"""Seats and slots against dictionaries: every selected row must hold its token's bytes."""

import os
import subprocess
import sys
from collections import Counter, OrderedDict
from itertools import count

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from hotset.attention.seat_tables import SeatTables
from hotset.kernels import hot_reference
from hotset.kernels.gather_rows import gather_rows
from hotset.kernels.hot_reference import RowRun, Total
from hotset.kernels.resolve_rows import resolve_rows
from hotset.kv.seats import DeviceBlock, HostSlot, Seat, Seats, SlotBlock

BLOCK_SIZE, SELECTED, NUM_SLOTS, NUM_SEATS = 4, 6, 8, 3
GROUPS = (1, 2)  # layers of each selection
MOST_TOKENS, DEVICE_BLOCKS, HOST_SLOTS = 40, 24, 40
ROW_BYTES = 8  # one number, which tells the request, the layer and the position
ROWS_PER_BLOCK = sum(GROUPS) * BLOCK_SIZE
EMPTY = -1


class Hot:
    """A hot request, as a dictionary sees it."""

    def __init__(self, seat: Seat, number: int, table: list[int]) -> None:
        self.seat, self.number = seat, number
        self.table = table  # device blocks of its tokens; -1: in host memory alone
        self.num_tokens = len(table) * BLOCK_SIZE
        # By selection: slot -> the position it holds, from the longest unused to the last used.
        self.slots: list[OrderedDict[int, int]] = []
        # By selection: positions that came for the last guess, until the layer selects.
        self.guessed: list[set[int]] = [set() for _ in GROUPS]


class SeatMachine(RuleBasedStateMachine):
    """Requests turn hot, select tokens, grow and end; memory is checked after each selection."""

    resolve, gather = staticmethod(hot_reference.resolve), staticmethod(hot_reference.gather)

    def __init__(self) -> None:
        super().__init__()
        sizes = {"num_seats": NUM_SEATS, "num_slots": NUM_SLOTS, "block_size": BLOCK_SIZE}
        self.seats = Seats(**sizes)
        self.tables = SeatTables(
            **sizes,
            rows_per_token=GROUPS,
            max_num_tokens=MOST_TOKENS,
            rows_per_block=ROWS_PER_BLOCK,
            device=torch.device("cpu"),
        )
        self.tables._resolve = self.resolve
        self.device = torch.full((DEVICE_BLOCKS, ROWS_PER_BLOCK), EMPTY)
        self.host = torch.full((HOST_SLOTS, ROWS_PER_BLOCK + 5), EMPTY)
        self.free_blocks, self.free_slots = list(range(DEVICE_BLOCKS)), list(range(HOST_SLOTS))
        self.hot: list[Hot] = []
        self.numbers = count(1)

    def values(self, number: int, index: int) -> torch.Tensor:
        """What block `index` of a request holds, all layers."""
        position = index * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        rows = [self.rows_at(number, group, position).flatten() for group in range(len(GROUPS))]
        return torch.cat(rows)

    def rows_at(self, number: int, group: int, position: torch.Tensor) -> torch.Tensor:
        """What tokens at `[T]` positions have in the layers of a group, `[T, layers]`."""
        layers = 10 * group + torch.arange(GROUPS[group])
        return number * 100_000 + layers * 1_000 + position[:, None]

    def take_block(self, number: int, index: int) -> DeviceBlock:
        block = DeviceBlock(self.free_blocks.pop())
        self.device[block] = self.values(number, index)
        return block

    def place(self, hot: Hot, index: int) -> None:
        slot = HostSlot(self.free_slots.pop())
        self.host[slot, :ROWS_PER_BLOCK] = self.values(hot.number, index)
        self.seats.place(hot.seat, index, slot)

    @precondition(lambda self: self.seats.num_free and len(self.free_blocks) >= 8)
    @rule(num_blocks=st.integers(3, 7), num_kept=st.integers(0, 2))
    def turn_hot(self, num_blocks: int, num_kept: int) -> None:
        if len(self.free_slots) < num_blocks:
            return
        number = next(self.numbers)
        last = num_blocks - 1  # partial, or not copied yet
        per_seat = NUM_SLOTS // BLOCK_SIZE
        kept = list(range(last - num_kept, last))
        parts = [SlotBlock(self.take_block(0, 0), None) for _ in range(per_seat - num_kept)]
        parts += [SlotBlock(self.take_block(number, i), i * BLOCK_SIZE) for i in kept]
        hot = Hot(self.seats.take(parts), number, [-1] * last + [self.take_block(number, last)])
        for index in range(last):
            self.place(hot, index)
        held = [-1] * (NUM_SLOTS - num_kept * BLOCK_SIZE)
        held += [i * BLOCK_SIZE + offset for i in kept for offset in range(BLOCK_SIZE)]
        hot.slots = [OrderedDict(enumerate(held)) for _ in GROUPS]
        self.hot.append(hot)

    @precondition(lambda self: self.hot)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        """One more block; the copy of the one before has ended or not."""
        hot = data.draw(st.sampled_from(self.hot))
        if hot.num_tokens == MOST_TOKENS or not self.free_blocks or not self.free_slots:
            return
        for index in range(len(hot.table)):
            if hot.table[index] >= 0 and data.draw(st.booleans()) and self.free_slots:
                self.place(hot, index)
                self.free_blocks.append(hot.table[index])
                hot.table[index] = -1
        hot.table.append(self.take_block(hot.number, len(hot.table)))
        hot.num_tokens += BLOCK_SIZE

    @precondition(lambda self: self.hot)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        hot = data.draw(st.sampled_from(self.hot))
        self.hot.remove(hot)
        self.free_slots += hot.seat.host.values()
        self.free_blocks += [block for block in hot.table if block >= 0]
        self.free_blocks += self.seats.leave(hot.seat)

    @rule()
    def fail(self) -> None:
        """A step breaks off: what slots hold may be anything."""
        self.seats.forget_slots()
        for hot in self.hot:
            for block in hot.seat.slot_blocks:
                self.device[block] = EMPTY
            hot.slots = [OrderedDict.fromkeys(range(NUM_SLOTS), -1) for _ in GROUPS]
            hot.guessed = [set() for _ in GROUPS]

    @precondition(lambda self: self.hot)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """All that select do so, of some of the requests and of one that is not hot.

        Before that, what a layer will select may be guessed: of what it selects, and of other
        tokens. Then the step may break off.
        """
        self.tables.apply(self.seats.take_updates())
        chosen = data.draw(st.lists(st.sampled_from(self.hot), unique=True, min_size=1))
        seats = torch.tensor([-1, *(hot.seat.number for hot in chosen)])
        for layer in range(len(GROUPS)):
            if data.draw(st.booleans()):
                self.attend(layer, seats, chosen, *self.draw(data, layer, chosen), is_guess=True)
                if data.draw(st.integers(0, 4)) == 0:
                    return self.fail()
            self.attend(layer, seats, chosen, *self.draw(data, layer, chosen))

    def draw(
        self, data: st.DataObject, layer: int, chosen: list[Hot]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer selects or is guessed to, and the rows of what is resident."""
        selection = torch.full((1 + len(chosen), SELECTED), -1, dtype=torch.int32)
        rows = torch.full_like(selection, -1)
        for i, hot in enumerate(chosen, 1):
            positions = data.draw(
                st.lists(st.integers(0, hot.num_tokens - 1), unique=True, max_size=SELECTED)
            )
            selection[i, : len(positions)] = torch.tensor(positions, dtype=torch.int32)
            for k, position in enumerate(positions):
                index, offset = divmod(position, BLOCK_SIZE)
                if hot.table[index] >= 0:
                    rows[i, k] = hot.table[index] * ROWS_PER_BLOCK + offset * GROUPS[layer]
        return selection, rows

    def attend(
        self,
        layer: int,
        seats: torch.Tensor,
        chosen: list[Hot],
        selection: torch.Tensor,
        rows: torch.Tensor,
        is_guess: bool = False,
    ) -> None:
        resident, totals = rows >= 0, self.tables.totals[layer]
        misses = self.tables.resolve(layer, selection, rows, seats, is_guess=is_guess)
        counted = Counter[Total]()
        start, count = sum(GROUPS[:layer]) * BLOCK_SIZE * ROW_BYTES, GROUPS[layer]
        run = RowRun(start, ROW_BYTES, count, BLOCK_SIZE, ROWS_PER_BLOCK, count)
        self.gather(self.host.view(torch.uint8), self.device.view(torch.uint8), *misses, run)
        assert (rows[0] == -1).all()
        for i, hot in enumerate(chosen, 1):
            wanted = [int(p) for p in selection[i] if p >= 0]
            at = rows[i, : len(wanted)]
            assert len(set(at.tolist())) == len(wanted), "two tokens have one row"
            flat = self.device.flatten()[start // ROW_BYTES :]
            found = flat[at[:, None] + torch.arange(count)]
            assert torch.equal(found, self.rows_at(hot.number, layer, torch.tensor(wanted)))
            in_slots = [p for k, p in enumerate(wanted) if not resident[i, k]]
            missing = self.use(hot.slots[layer], in_slots)
            assert misses.counts[i] == len(missing)
            if is_guess:
                hot.guessed[layer] = missing
                counted += Counter({Total.GUESSED: len(missing)})
            else:
                num_hits = len(in_slots) - len(missing)
                right = hot.guessed[layer] & set(in_slots) - missing
                counted += Counter({Total.HIT: num_hits, Total.MISSED: len(missing)})
                counted += Counter({Total.GUESSED_RIGHT: len(right)})
                hot.guessed[layer] = set()
            slots = self.tables._layers[layer]
            order = slots.order[hot.seat.number].tolist()
            assert order == list(hot.slots[layer])
            held = slots.token_in[hot.seat.number].tolist()
            assert held == [hot.slots[layer][slot] for slot in range(NUM_SLOTS)]
        assert (self.tables.totals[layer] - totals).tolist() == [counted[each] for each in Total]

    def use(self, slots: OrderedDict[int, int], wanted: list[int]) -> set[int]:
        """What a dictionary makes of it; returns those that were not there."""
        hits = [slot for slot, position in slots.items() if position in wanted]
        missing = [p for p in wanted if p not in slots.values()]
        unused = [slot for slot in slots if slot not in hits]
        for slot, position in zip(unused, missing, strict=False):
            slots[slot] = position
            slots.move_to_end(slot)
        for slot in hits:
            slots.move_to_end(slot)
        return set(missing)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.seats.check()
        assert not self.tables.totals[:, 2].any(), "a token was in host memory nowhere"
        used = [block for hot in self.hot for block in [*hot.table, *hot.seat.slot_blocks]]
        blocks = [*self.free_blocks, *(block for block in used if block >= 0)]
        assert sorted(blocks) == list(range(DEVICE_BLOCKS))


class KernelSeatMachine(SeatMachine):
    """The same with the kernels, in Triton's interpreter."""

    resolve, gather = staticmethod(resolve_rows), staticmethod(gather_rows)


TestSeatMachine = SeatMachine.TestCase
TestSeatMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
if not torch.cuda.is_available():  # tensors of the CPU
    TestKernelSeatMachine = KernelSeatMachine.TestCase
    TestKernelSeatMachine.settings = settings(max_examples=4, stateful_step_count=15, deadline=None)


def test_what_a_seat_held_before_is_gone_when_it_is_taken_again() -> None:
    sizes = {"num_seats": 1, "num_slots": 4, "block_size": 4}
    seats = Seats(**sizes)
    tables = SeatTables(
        **sizes,
        rows_per_token=[1],
        max_num_tokens=8,
        rows_per_block=4,
        device=torch.device("cpu"),
    )
    for start in (4, None):
        seat = seats.take([SlotBlock(DeviceBlock(0), start)])
        seats.place(seat, 1, HostSlot(5))
        tables.apply(seats.take_updates())
        selection = torch.tensor([[5]], dtype=torch.int32)
        rows = torch.full_like(selection, -1)
        misses = tables.resolve(0, selection, rows, torch.tensor([0]))
        assert misses.counts.item() == (start is None)
        seats.leave(seat)


@pytest.mark.parametrize("num_slots", [2**15 + 4])
def test_more_slots_than_a_number_of_16_bits_has_are_a_bug(num_slots: int) -> None:
    with pytest.raises(AssertionError, match="16 bits"):
        SeatTables(
            num_seats=1,
            num_slots=num_slots,
            rows_per_token=[1],
            max_num_tokens=8,
            block_size=4,
            rows_per_block=4,
            device=torch.device("cpu"),
        )


def test_a_cpu_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import hotset.attention.choice"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
