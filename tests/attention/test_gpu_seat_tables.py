"""Hot requests on a GPU: recorded once, replayed, against the same in PyTorch on the CPU."""

import random

import pytest
import torch

from hotset.attention.seat_tables import SeatTables
from hotset.kernels import hot_reference
from hotset.kernels.gather_rows import gather_rows
from hotset.kernels.hot_reference import Misses, RowRun, Total
from hotset.kv.seats import DeviceBlock, HostSlot, Seats, SlotBlock

pytestmark = pytest.mark.gpu

BLOCK_SIZE, NUM_LAYERS, SELECTED, NUM_SLOTS, NUM_SEATS, CONTEXT = 64, 3, 2048, 4096, 5, 9000
ROW_BYTES = 1152
ROWS_PER_BLOCK = NUM_LAYERS * BLOCK_SIZE
_RUN = RowRun(0, ROW_BYTES, 1, BLOCK_SIZE, ROWS_PER_BLOCK, 1)
_PAIR = _RUN._replace(start_bytes=BLOCK_SIZE * ROW_BYTES, rows_per_token=2)
# Of each layer that selects: one alone, and two whose rows come one after another or at once.
RUNS = {
    "one by one": [[_RUN], [_PAIR, _PAIR._replace(start_bytes=_PAIR.start_bytes + ROW_BYTES)]],
    "at once": [[_RUN], [_PAIR._replace(num_layers=2)]],
}
CONTEXT_BLOCKS = CONTEXT // BLOCK_SIZE + 1
NUM_BLOCKS = NUM_SEATS * NUM_SLOTS // BLOCK_SIZE
SIZES = {"num_seats": NUM_SEATS, "num_slots": NUM_SLOTS, "block_size": BLOCK_SIZE}


class Side:
    """Tables and memory on one device."""

    def __init__(self, device: str, host: torch.Tensor, runs: list[list[RowRun]]) -> None:
        self.host, self.runs = host, runs
        self.tables = SeatTables(
            **SIZES,
            rows_per_token=[1, 2],  # the last layer uses the selection of the one before
            max_num_tokens=CONTEXT,
            rows_per_block=ROWS_PER_BLOCK,
            device=torch.device(device),
        )
        shape = (NUM_BLOCKS, ROWS_PER_BLOCK * ROW_BYTES)
        self.memory = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.seats = torch.full((NUM_SEATS + 1,), -1, device=device)  # one row is of padding
        shape = (2, NUM_LAYERS - 1, NUM_SEATS + 1, SELECTED)  # guessed, and selected
        self.selection = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.rows = torch.full_like(self.selection, -1)

    def step(self) -> list[Misses]:
        """All layers, as a step of the model runs them."""
        gather = gather_rows if self.memory.is_cuda else hot_reference.gather
        self.rows.fill_(-1)
        listed = []
        for layer, runs in enumerate(self.runs):
            for number, is_guess in enumerate((True, False)):
                chosen = self.selection[number, layer], self.rows[number, layer], self.seats
                listed.append(self.tables.resolve(layer, *chosen, is_guess=is_guess))
                for run in runs:
                    gather(self.host, self.memory, *listed[-1], run)
        return listed


def select(length: int, rng: torch.Generator) -> torch.Tensor:
    """What a layer selects of `length` tokens: some of them again and again."""
    weights = torch.rand(length, generator=rng)
    weights[::3] += 0.4
    chosen = weights.topk(min(length, SELECTED)).indices.sort().values.int()
    return torch.nn.functional.pad(chosen, (0, SELECTED - len(chosen)), value=-1)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("length", [NUM_SLOTS - 1, NUM_SLOTS, NUM_SLOTS + 1, CONTEXT])
def test_64_replays_leave_what_the_reference_leaves(length: int, runs: list[list[RowRun]]) -> None:
    torch.manual_seed(0)
    shape = (NUM_SEATS * CONTEXT_BLOCKS, ROWS_PER_BLOCK * ROW_BYTES + 4096)
    host = torch.randint(0, 256, shape, dtype=torch.uint8).pin_memory()
    device, cpu = Side("cuda", host, runs), Side("cpu", host, runs)
    device.step()  # loads the kernels; nobody has a seat
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device.step()

    rng, order = torch.Generator().manual_seed(length), random.Random(length)
    seats = Seats(**SIZES)
    taken = []
    for _ in range(64):
        if seats.num_free:
            blocks = range(len(taken) * NUM_SLOTS // BLOCK_SIZE, NUM_BLOCKS)
            parts = [SlotBlock(DeviceBlock(b), None) for b in blocks[: NUM_SLOTS // BLOCK_SIZE]]
            seat = seats.take(parts)
            for index in range(CONTEXT_BLOCKS):
                seats.place(seat, index, HostSlot(len(taken) * CONTEXT_BLOCKS + index))
            taken.append(seat)
        elif order.random() < 0.2:
            seats.forget_slots()
        updates = seats.take_updates()
        running = order.sample(taken, order.randint(1, len(taken)))
        numbers = [seat.number for seat in running]
        numbers += [-1] * (NUM_SEATS + 1 - len(numbers))
        for side in (device, cpu):
            side.tables.apply(updates)
            side.seats.copy_(torch.tensor(numbers))
        for layer in range(NUM_LAYERS - 1):
            for row in range(len(running)):
                chosen = torch.stack([select(length, rng) for _ in range(2)])
                device.selection[:, layer, row] = chosen.to(device.selection.device)
                cpu.selection[:, layer, row] = chosen

        graph.replay()
        cpu.step()

        used = slice(len(running))
        assert torch.equal(device.rows[:, :, used].cpu(), cpu.rows[:, :, used])
        for got, expected in zip(device.tables._layers, cpu.tables._layers, strict=True):
            for seat in taken:
                assert torch.equal(got.token_in[seat.number].cpu(), expected.token_in[seat.number])
                assert torch.equal(got.order[seat.number].cpu(), expected.order[seat.number])
        assert torch.equal(device.memory.cpu(), cpu.memory)
        assert torch.equal(device.tables.totals.cpu(), cpu.tables.totals)
    totals = device.tables.totals
    assert not totals[:, Total.LOST].any()
    if length == CONTEXT:  # slots hold no more than a part of it
        assert totals[:, Total.GUESSED_RIGHT].all()
