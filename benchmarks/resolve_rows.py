"""What it costs on a GPU to find a layer's selected tokens in slots, and how many it does not find.

`kernels/resolve_rows` by seats and slots, recorded as a graph of steps whose selections overlap as
asked for: of 2,048 tokens per step, drawn as `cost/selection` says. Contexts of 33,792 tokens.
Also the misses that the cost model predicts. The figures are of a step, over replays of the graph.
Takes about half a minute.

    python benchmarks/resolve_rows.py --out benchmarks/results/resolve_rows_h200.json
"""

import math
import time
from typing import Any

import record
import torch
from device_parts import device_s

from hotset.attention.seat_tables import SeatTables
from hotset.cost.selection import DrawnSelections, correlation
from hotset.kv.seats import DeviceBlock, HostSlot, Seats, SlotBlock

BLOCK_SIZE, SELECTED, CONTEXT = 64, 2048, 33_792
SEATS, SLOTS = (1, 16, 86, 256), (3072, 4096, 6144, 8192)
OVERLAP, SEED = 0.4, 0
NUM_STEPS = 48  # of which the last half is measured, with slots that are warm
NUM_REPLAYS = 10


def seated(num_seats: int, num_slots: int) -> SeatTables:
    """Tables with every seat taken, its tokens in host memory."""
    sizes = {"num_seats": num_seats, "num_slots": num_slots, "block_size": BLOCK_SIZE}
    tables = SeatTables(
        **sizes,
        rows_per_token=[1],
        max_num_tokens=CONTEXT,
        rows_per_block=BLOCK_SIZE,
        device=torch.device("cuda"),
    )
    seats = Seats(**sizes)
    for _ in range(num_seats):
        seat = seats.take([SlotBlock(DeviceBlock(b), None) for b in range(num_slots // BLOCK_SIZE)])
        for index in range(CONTEXT // BLOCK_SIZE):
            seats.place(seat, index, HostSlot(index))
    tables.apply(seats.take_updates())
    return tables


def selections(num_seats: int) -> torch.Tensor:
    """`[steps, seats, SELECTED]` positions, ascending: what is drawn overlaps from step to step."""
    share = correlation(SELECTED / CONTEXT, OVERLAP)
    lasting = math.sqrt(share) * torch.randn(num_seats, CONTEXT, device="cuda")
    steps = []
    for _ in range(NUM_STEPS):
        scores = lasting + math.sqrt(1 - share) * torch.randn_like(lasting)
        steps.append(scores.topk(SELECTED).indices.sort(dim=1).values.int())
    return torch.stack(steps)


def measure(num_seats: int, num_slots: int, chosen: torch.Tensor) -> dict[str, Any]:
    """Microseconds of a launch and rows that a seat misses, with warm slots."""
    tables, seats = seated(num_seats, num_slots), torch.arange(num_seats, device="cuda")
    rows = torch.full_like(chosen, -1)

    def run(steps: range) -> None:
        for step in steps:
            tables.resolve(0, chosen[step], rows[step], seats)

    half = NUM_STEPS // 2
    run(range(half))
    before = tables.totals[0].tolist()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(range(half, NUM_STEPS))
    graph.replay()
    torch.cuda.synchronize()
    misses = tables.totals[0].tolist()[1] - before[1]
    seconds = device_s(graph.replay, NUM_REPLAYS)
    predicted = DrawnSelections(OVERLAP).misses(CONTEXT, SELECTED, num_slots)
    return {
        "seats": num_seats,
        "slots": num_slots,
        **{
            f"us_{name}": value
            for name, value in record.percentiles(seconds, scale=1e6 / half).items()
        },
        "misses": round(misses / half / num_seats),
        "predicted_misses": round(predicted),
    }


def main() -> None:
    arguments = record.arguments(__doc__).parse_args()
    started_s = time.perf_counter()
    torch.manual_seed(SEED)
    found = []
    for num_seats in SEATS:
        chosen = selections(num_seats)
        found += [measure(num_seats, num_slots, chosen) for num_slots in SLOTS]
    taken_s = round(time.perf_counter() - started_s, 1)
    result = record.start(seed=SEED, overlap=OVERLAP, seconds=taken_s, rows=found)
    record.write(arguments.out, result)
    print(record.table(found))
    print(f"{taken_s} s")


if __name__ == "__main__":
    main()
