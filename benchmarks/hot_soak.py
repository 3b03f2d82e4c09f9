"""Requests of sparse attention by the hundred, hot and resident, with all going wrong that can.

Each seed chooses a family, sizes and what happens: aborts, forks, preemption, a full host memory,
faults of the disk, fetches that fail. It ends with an error where an answer is not a resident
engine's, or where a block, slot, seat or index block does not come back: `tests/sparse_soak.py`.

    python benchmarks/hot_soak.py --requests 256 --seeds 8 --out benchmarks/results/hot_soak.json
"""

import logging
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import record
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from engines import make_engine
from sparse_soak import EVENTS, soak


def run(seed: int, num_requests: int) -> dict[str, Any]:
    """One seed; what happened, and how long it took."""
    with ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory())

        def make(*args: Any, **options: Any) -> Any:
            engine = make_engine(*args, **options)
            undo.callback(engine.close)
            return engine

        start_s = time.perf_counter()
        events = soak(make, seed, num_requests, Path(folder))
    seconds = round(time.perf_counter() - start_s, 1)
    return {"seed": seed, "seconds": seconds, "events": dict(sorted(events.items()))}


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=8, help="0 to before this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # the faults are injected
    runs, totals = [], Counter[str]()
    for seed in range(given.seeds):
        runs.append(run(seed, given.requests))
        totals.update(runs[-1]["events"])
        print(f"seed {seed}: {runs[-1]['seconds']} s, {runs[-1]['events']}", flush=True)
    missing = [event for event in EVENTS if not totals[event]]
    assert not missing, f"never happened: {', '.join(missing)}"
    found = record.start(requests=given.requests, totals=dict(sorted(totals.items())), runs=runs)
    record.write(given.out, found)


if __name__ == "__main__":
    main()
