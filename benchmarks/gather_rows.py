"""How fast a GPU gathers rows of tokens from pinned host memory, which bounds the hot set.

`kernels/gather_rows` over random rows of a pool in pinned host memory. By the size of a row, of the
pool and of a launch, then at the size of a latent row (1,152 bytes) by programs and rows under way,
by seats, with loads of 8 bytes, over addresses in order, beside copies down, and beside experts.
The rows of four layers that share a selection are brought in both layouts, at once and in parts.
The rows of each case are compared with what the pool holds. Beside each stands the rate that the
plan takes. Takes about a minute, and 48 GiB of host memory.

    python benchmarks/gather_rows.py --out benchmarks/results/gather_rows_h200.json
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
import triton
from device_parts import device_s

import hotset.kernels.gather_rows as gather
from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.tuning import TUNINGS
from hotset.experts.compute import resident_experts
from hotset.kernels.device import likely_hardware
from hotset.kernels.gather_rows import gather_rows
from hotset.kernels.hot_reference import RowRun
from hotset.memory.arena import HostArena
from hotset.memory.pin import pin, unpin

ROW_BYTES = (656, 1152, 2304, 4608)
LATENT = 1152
BLOCK_SIZE = 64
CHUNK_BYTES = 2**30  # of the pool, pinned at once
FEW, MANY = (8, 719), (86, 719)  # seats and rows of each: 719 of 2,048 miss at an overlap of 0.4
SEATS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROGRAMS = (132, 528, 1056, 2112, 4224)
ROWS_AT_ONCE = (1, 2, 4, 8)
BESIDE = ((132, 4), (64, 8), (32, 8), (32, 16), (16, 8), (16, 16), (8, 16))  # programs, rows
EXPERTS = (256, 7168, 512)  # number, hidden and middle size
NUM_RUNS = 20
SPREAD = (10, 50, 90)  # percentiles of the launches
NUM_COPIES = 8
COPY_BYTES = 2**30
SEED = 0


class Pool:
    """Pinned host memory in which every word of 8 bytes holds its own number."""

    def __init__(self, gib: int, num_threads: int) -> None:
        started_s = time.perf_counter()
        self._arena = HostArena(num_slots=gib * 2**30 // CHUNK_BYTES, block_bytes=CHUNK_BYTES)
        self._arena.use_huge_pages()
        self._arena.commit(0, len(self._arena.slots), num_threads=num_threads)
        self.words = torch.from_numpy(self._arena.slots).view(torch.int64).view(-1)
        torch.set_num_threads(num_threads)
        size = CHUNK_BYTES // 8
        for first in range(0, len(self.words), size):
            torch.arange(first, first + size, out=self.words[first : first + size])
        for slot in range(len(self._arena.slots)):
            if error := pin(self._arena.address(slot), CHUNK_BYTES):
                raise SystemExit(f"{CHUNK_BYTES} bytes cannot be pinned: CUDA error {error}")
        self.seconds = round(time.perf_counter() - started_s, 1)

    def view(self, gib: int, row_bytes: int) -> torch.Tensor:
        """The first `gib` as `[slots, bytes]` uint8, of `BLOCK_SIZE` rows each."""
        slot_words = BLOCK_SIZE * row_bytes // 8
        num_slots = gib * 2**30 // 8 // slot_words
        return self.words[: num_slots * slot_words].view(num_slots, -1).view(torch.uint8)

    def close(self) -> None:
        """Unpin it."""
        for slot in range(len(self._arena.slots)):
            unpin(self._arena.address(slot))


class Work:
    """Rows to gather: random ones of a pool, in lists of seats, to the device."""

    def __init__(
        self,
        source: torch.Tensor,
        runs: int | Sequence[RowRun],
        seats: int,
        rows: int,
        *,
        is_sorted: bool = False,
    ) -> None:
        """`runs` are brought one after another; a number is the bytes of a row that fills one."""
        if isinstance(runs, int):
            runs = [RowRun(0, runs, 1, BLOCK_SIZE, BLOCK_SIZE, 1)]
        self.source, self.runs = source, runs
        self.token_bytes = sum(run.num_layers * run.row_bytes for run in runs)
        self.num_rows = seats * rows
        most = len(source) * BLOCK_SIZE
        # Other rows with each launch, as the device keeps what it read a moment ago.
        size = (NUM_RUNS + 2, seats, rows)
        self.lists = torch.randint(most, size, dtype=torch.int32, device="cuda")
        if is_sorted:
            self.lists = self.lists.sort(dim=2).values
        self.turn = 0
        tokens = torch.arange(self.num_rows, dtype=torch.int32, device="cuda").view(seats, rows)
        block, offset = tokens // BLOCK_SIZE, tokens % BLOCK_SIZE
        self.rows = block * runs[0].rows_per_block + offset * runs[0].rows_per_token
        self.counts = torch.full((seats,), rows, dtype=torch.int32, device="cuda")
        num_blocks = -(-self.num_rows // BLOCK_SIZE)
        self.target = torch.empty(num_blocks, source.shape[1], dtype=torch.uint8, device="cuda")

    def launch(self, **tuning: int) -> None:
        """Gather the next list."""
        self.turn = (self.turn + 1) % len(self.lists)
        tuned = replace(TUNINGS["cuda"], **tuning)
        lists = (self.lists[self.turn], self.rows, self.counts)
        for run in self.runs:
            gather_rows(self.source, self.target, *lists, run, tuning=tuned)

    def row(self, case: str, call: Callable[[], None] | None = None) -> dict[str, Any]:
        """A row of the table: GB/s of `call`, by default `launch`; the result is checked."""
        call = call or self.launch
        self.target.zero_()
        call()
        self.check()
        seconds = device_s(call, NUM_RUNS)
        num_bytes = self.num_rows * self.token_bytes
        planned_s = sum(planned_s_per_token(run.num_layers * run.row_bytes) for run in self.runs)
        rates = [num_bytes / each / 1e9 for each in seconds]
        return {
            "case": case,
            "row_bytes": self.token_bytes,
            "pool_gib": round(self.source.nbytes / 2**30),
            "rows": self.num_rows,
            **{f"gb_per_s_{p}": v for p, v in record.percentiles(rates, of=SPREAD).items()},
            "planned_gb_per_s": self.token_bytes / planned_s / 1e9,
        }

    def check(self) -> None:
        """Every row must be the one that was asked for."""
        places = self.lists[self.turn].view(-1, 1).long()
        goals = torch.arange(self.num_rows, device="cuda").unsqueeze(1)
        block_words = self.target.shape[1] // 8
        got = self.target.view(torch.int64).flatten()
        for run in self.runs:
            token_words = run.rows_per_token * run.row_bytes // 8
            inside = torch.arange(run.num_layers * run.row_bytes // 8, device="cuda")
            first, goal = (
                run.start_bytes // 8
                + at // BLOCK_SIZE * block_words
                + at % BLOCK_SIZE * token_words
                for at in (places, goals)
            )
            if not torch.equal(got[goal + inside], first + inside):
                raise SystemExit(f"rows of {run} are not those asked for")


def planned_s_per_token(run_bytes: int) -> float:
    """Seconds that the plan takes for a run of that many bytes."""
    c = CALIBRATIONS["hotset"]
    link = c.link_bytes_per_s(likely_hardware(torch.device("cuda"))) * c.gather_efficiency
    return max(run_bytes / link, 1 / c.gather_rows_per_s)


def by_size(pool: Pool, pool_gib: list[int]) -> list[dict[str, Any]]:
    """By the size of a row, of the pool and of a launch."""
    return [
        Work(pool.view(gib, row_bytes), row_bytes, *size).row("size")
        for row_bytes in ROW_BYTES
        for gib in pool_gib
        for size in (FEW, MANY)
    ]


def by_programs(source: torch.Tensor) -> list[dict[str, Any]]:
    """Few and many latent rows by how they are shared out."""
    found = []
    for work in (Work(source, LATENT, *size) for size in (FEW, MANY)):
        for programs in PROGRAMS:
            for at_once in ROWS_AT_ONCE:
                launch = partial(work.launch, gather_programs=programs, gather_rows=at_once)
                case = f"{programs:,} programs, {at_once} rows at once"
                found.append(work.row(case, launch))
    return found


def by_seats(source: torch.Tensor) -> list[dict[str, Any]]:
    """By seats, with the microseconds of a launch that finds nothing to gather."""
    found = []
    for seats in SEATS:
        work = Work(source, LATENT, seats, FEW[1])
        row = work.row(f"{seats} seats")
        work.counts.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(64):
                work.launch()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(row | {"us_without_rows": start.elapsed_time(end) * 1e3 / 64})
    return found


def by_layers(source: torch.Tensor) -> list[dict[str, Any]]:
    """The rows of four layers that share a selection, brought in as many launches as parts."""
    side = RowRun(0, LATENT, 1, BLOCK_SIZE, 4 * BLOCK_SIZE, 4)
    apart = [
        side._replace(start_bytes=layer * BLOCK_SIZE * LATENT, rows_per_token=1)
        for layer in range(4)
    ]
    found = [Work(source, apart, *MANY).row("4 layers, one after another")]
    beside = TUNINGS["cuda"]
    for parts in ([4], [1, 3], [1, 1, 2], [1, 1, 1, 1]):
        firsts = [sum(parts[:i]) for i in range(len(parts))]
        runs = [
            side._replace(start_bytes=first * LATENT, num_layers=count)
            for first, count in zip(firsts, parts, strict=True)
        ]
        work = Work(source, runs, *MANY)
        name = "4 layers side by side, parts of " + ", ".join(map(str, parts))
        found.append(work.row(name))
        few = {"gather_programs": beside.gather_programs_beside}
        few["gather_rows"] = beside.gather_rows_beside
        launch = partial(work.launch, **few)
        found.append(work.row(f"{name}, {few['gather_programs']} programs", launch))
    return found


def with_loads_of_8_bytes(work: Work) -> dict[str, Any]:
    """Where the compiler does not know that the pool is aligned."""
    kernel = gather._gather_rows
    gather._gather_rows = triton.jit(kernel.fn, do_not_specialize_on_alignment=["source"])
    try:
        return work.row("loads of 8 bytes")
    finally:
        gather._gather_rows = kernel


def beside_copies_down(work: Work) -> dict[str, Any]:
    """While copies go down, whose rate is measured too."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    side = torch.cuda.Stream()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        events[0].record(side)
        for _ in range(NUM_COPIES):
            target.copy_(source, non_blocking=True)
        events[1].record(side)
    row = work.row("beside copies down")
    copies = NUM_COPIES * COPY_BYTES / events[0].elapsed_time(events[1]) / 1e6
    return row | {"copies_gb_per_s": copies}


def beside_experts(work: Work) -> list[dict[str, Any]]:
    """While the experts of 128 tokens are computed, by how the rows are shared out.

    The experts' seconds alone and beside the rows stand in each row, and those of both together.
    """
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    num_experts, hidden_size, middle_size = EXPERTS
    up = torch.randn(num_experts, 2 * middle_size, hidden_size, **options)
    down = torch.randn(num_experts, hidden_size, middle_size, **options)
    hidden = torch.randn(128, hidden_size, **options)
    ids = torch.rand(128, num_experts, device="cuda").topk(8).indices
    weights = torch.rand(128, 8, device="cuda")
    compute = partial(resident_experts, hidden, ids, weights, up, down)
    side = torch.cuda.Stream(priority=-1)

    def both(**tuning: int) -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work.launch(**tuning)
        for _ in range(2):  # together longer than the rows take
            compute()
        torch.cuda.current_stream().wait_stream(side)

    found = []
    alone_s = 2 * median(device_s(compute, NUM_RUNS))
    for programs, at_once in BESIDE:
        tuning = {"gather_programs": programs, "gather_rows": at_once}
        row = work.row(
            f"{programs} programs, {at_once} rows at once", partial(work.launch, **tuning)
        )
        row["case"] += ", experts beside them"
        together_s = median(device_s(partial(both, **tuning), NUM_RUNS))
        found.append(row | {"experts_ms": alone_s * 1e3, "both_ms": together_s * 1e3})
    return found


def huge_page_bytes() -> int:
    """Bytes of this process in huge pages."""
    for line in Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(pool: Pool, pool_gib: list[int], *, only_beside: bool) -> list[dict[str, Any]]:
    """All rows of the table, or those beside experts."""
    largest = pool.view(pool_gib[-1], LATENT)
    many = Work(largest, LATENT, *MANY)
    if only_beside:
        return beside_experts(many)
    ordered = Work(largest, LATENT, *MANY, is_sorted=True)
    return [
        *by_size(pool, pool_gib),
        *by_programs(largest),
        *by_seats(largest),
        *by_layers(pool.view(pool_gib[-1], 4 * LATENT)),
        many.row("random"),
        ordered.row("sorted by address"),
        with_loads_of_8_bytes(many),
        beside_copies_down(many),
        *beside_experts(many),
    ]


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--pool-gib", default="1,16,40", help="sizes of the pool, ascending")
    parser.add_argument("--only-beside", action="store_true", help="rows beside experts alone")
    arguments = parser.parse_args()
    started_s = time.perf_counter()
    torch.manual_seed(SEED)
    pool_gib = [int(size) for size in arguments.pool_gib.split(",")]
    pool = Pool(pool_gib[-1], num_threads=12)
    try:
        rows = measure(pool, pool_gib, only_beside=arguments.only_beside)
    finally:
        torch.cuda.synchronize()
        pool.close()
    found = record.start(
        seed=SEED,
        pool={"seconds_to_pin": pool.seconds, "huge_page_bytes": huge_page_bytes()},
        seconds=round(time.perf_counter() - started_s, 1),
        rows=rows,
    )
    record.write(arguments.out, found)
    print(record.table(rows))
    print(f"{found['seconds']} s")


if __name__ == "__main__":
    main()
