"""What a step costs by its rows: products of one layer, and recorded steps without attention.

Llama-3.1-8B in bfloat16 on one GPU. Each product is timed over four weights in turn, recorded as a
CUDA graph, so that none is found in L2; the best of five replays. Gate and up are timed once more
with what reads them, as one product and as two. `benchmarks/play_schedule.py` has its table of
recorded steps from here.

    python benchmarks/step_products.py --out benchmarks/results/step_products_h200.json
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import record
import torch
from torch.nn import functional

from hotset.engine.build import build_engine
from hotset.executor.recording import GraphRecorder
from hotset.model.dummy import load_dummy
from hotset.options import Options

MODEL = "llama-3.1-8b"
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 448, 512, 576, 640, 768, 1024)
MORE_ROWS = (1536, 2048)


def best_us(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of a call."""
    for call in calls:
        call()  # loads kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    recorder = GraphRecorder(torch.device("cuda"))
    return round(min(recorder.seconds([graph]) for _ in range(5)) * 1e6 / len(calls), 1)


def products() -> dict[str, dict[int, float]]:
    """By product and rows, microseconds."""
    found: dict[str, dict[int, float]] = {}
    for name, (columns, depth) in SHAPES.items():
        options = {"device": "cuda", "dtype": torch.bfloat16}
        weights = [torch.randn(columns, depth, **options) for _ in range(4)]
        found[name] = {}
        for rows in ROWS + MORE_ROWS:
            inputs = [torch.randn(rows, depth, **options) for _ in weights]
            pairs = zip(inputs, weights, strict=True)
            found[name][rows] = best_us([partial(functional.linear, x, w) for x, w in pairs])
    return found


@torch.compile(dynamic=True)
def _activate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


def gate_and_up() -> dict[str, dict[int, float]]:
    """By whether it is one product, and rows: microseconds with the activation."""
    columns, depth = SHAPES["gate_up"]
    half = columns // 2
    options = {"device": "cuda", "dtype": torch.bfloat16}
    weights = [torch.randn(columns, depth, **options) for _ in range(4)]

    def whole(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found = functional.linear(x, weight)
        return _activate(found[:, :half], found[:, half:])

    def apart(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate, up = (functional.linear(x, part) for part in weight.split(half))
        return _activate(gate, up)

    found: dict[str, dict[int, float]] = {}
    for way in (whole, apart):
        found[way.__name__] = {}
        for rows in (16, 32, *ROWS, *MORE_ROWS):
            inputs = [torch.randn(rows, depth, **options) for _ in weights]
            pairs = zip(inputs, weights, strict=True)
            found[way.__name__][rows] = best_us([partial(way, x, weight) for x, weight in pairs])
    return found


def recorded_steps() -> dict[str, dict[int, float]]:
    """By kind of step and size, milliseconds; those of decodes attend to one token each."""
    config = Options.of(hot_gib=16, max_num_batched_tokens=8192, max_model_len=8192)
    engine = build_engine(config, load_dummy(MODEL, device="cuda", dtype="auto"))
    graphs = engine.executor.runner._graphs
    assert graphs is not None
    parts = {
        "decode": [(size, [step.graph]) for size, step in sorted(graphs._decodes.items())],
        "mixed": [(size, step.parts) for size, step in sorted(graphs._mixed.items())],
    }
    found = {
        kind: {size: round(graphs._recorder.seconds(recorded) * 1e3, 2) for size, recorded in steps}
        for kind, steps in parts.items()
    }
    engine.close()
    return found


@torch.inference_mode()
def main() -> None:
    arguments = record.arguments(__doc__).parse_args()
    found = record.start(
        products_us=products(), gate_and_up_us=gate_and_up(), recorded_ms=recorded_steps()
    )
    record.write(arguments.out, found)
    print(json.dumps({name: found[name] for name in ("gate_and_up_us", "recorded_ms")}))


if __name__ == "__main__":
    main()
