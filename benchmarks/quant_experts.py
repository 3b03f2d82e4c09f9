r"""A layer of experts in few bits on a GPU: its products by address, and what their bytes predict.

Random bits in the shapes and formats of published checkpoints, made on the device, uniform routing,
all payloads on the device. Each time is that of a call among several with other tokens and other
experts, recorded as one CUDA graph, so that no weights are found in L2 which a model would have to
read. Beside it: the fused kernels with the same sizes in bfloat16 (`silu`, no bias), the bytes of
the experts hit over the rate of the device's memory and what the launches take, and the target of
the design where there is one. Compiling included, all of it takes about two minutes.

    python benchmarks/quant_experts.py --out benchmarks/results/quant_experts_h200
    python benchmarks/quant_experts.py --sweep --tokens 1,256 --out /tmp/tiles \
        --layers gpt-oss-120b,Qwen3-30B-A3B-FP8,Qwen3-30B-A3B-FP8x8,Qwen3-30B-A3B-int4

writes `.json` and `.md`. `--sweep` tries tiles for each product (`quant_tiles.py`), the fastest
first, and takes about 90 s on 16 CPUs.
"""

import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import quant_tiles
import record
import torch
from fused_experts import measure, replays_us

from hotset.cost.rates import Rates
from hotset.cost.tuning import Tiles
from hotset.experts.compute import address_table
from hotset.experts.narrow import NarrowLayout
from hotset.kernels import narrow_experts as kernels
from hotset.kernels.device import likely_hardware
from hotset.kernels.fused_experts import fused_experts
from hotset.kernels.narrow_forms import Gate
from hotset.kernels.narrow_launch import kind_of
from hotset.weight_format import FP8_BLOCK, INT4_128, MXFP4, WeightFormat

DEVICE = torch.device("cuda")
SEED = 0
NUM_STEPS = 6  # of a graph, with inputs of their own
LAUNCHES_US = 4 * 3.0  # of a layer within a graph: route, up, down, sum


@dataclass(frozen=True)
class Layer:
    """The sizes of a published model's layer, and the design's microseconds by tokens."""

    name: str
    form: WeightFormat
    num_experts: int
    top_k: int
    hidden: int
    middle: int
    gate: Gate
    targets_us: tuple[tuple[int, float], ...] = ()

    @functools.cached_property
    def layout(self) -> NarrowLayout:
        """Of one expert."""
        rows = (2 * self.middle,) if self.gate.alpha else (2, self.middle)
        return NarrowLayout((*rows, self.hidden), (self.hidden, self.middle), self.form)


GPT_OSS = Gate(1.702, 7.0)
LAYERS = [
    Layer("gpt-oss-20b", MXFP4, 32, 4, 2880, 2880, GPT_OSS),
    Layer("gpt-oss-120b", MXFP4, 128, 4, 2880, 2880, GPT_OSS, ((1, 33), (256, 480))),
    Layer("Qwen3-30B-A3B-FP8", FP8_BLOCK, 128, 8, 2048, 768, Gate(), ((1, 30), (256, 175))),
    Layer(
        "Qwen3-30B-A3B-FP8x8", replace(FP8_BLOCK, input_bits=8), 128, 8, 2048, 768,
        Gate(), ((1, 30), (256, 175), (8192, 1000)),
    ),
    Layer("Qwen3-30B-A3B-int4", INT4_128, 128, 8, 2048, 768, Gate()),
]  # fmt: skip


class Weights:
    """What a layer reads, on the device: random bits that are all numbers, and the same sizes wide.

    Attributes:
        payloads: `[E, payload_bytes]` uint8.
        table: `[E]` addresses.
        biases: None where the layer has none.
        wide: addresses of the matrices in bfloat16; None where they are not asked for.
    """

    def __init__(self, layer: Layer, *, with_wide: bool) -> None:
        torch.manual_seed(SEED)
        layout = layer.layout
        size = (layer.num_experts, layout.payload_bytes)
        self.payloads = torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE)
        for matrix in layout.matrices:
            codes, scales, _ = matrix.views(self.payloads)
            if layer.form.code == "e4m3":
                codes.masked_fill_(codes & 127 == 127, 56)
            scales.fill_({"e4m3": 2e-4, "e2m1": 120, "int4": 4e-3}[layer.form.code])
        steps = layout.payload_bytes * torch.arange(layer.num_experts, device=DEVICE)
        self.table = self.payloads.data_ptr() + steps
        self.biases = None
        if layer.gate.alpha:
            up = torch.randn(layer.num_experts, 2 * layer.middle, device=DEVICE).bfloat16()
            self.biases = up, torch.randn(layer.num_experts, layer.hidden, device=DEVICE).bfloat16()
        self.wide = None
        if with_wide:
            up_size = (layer.num_experts, 2 * layer.middle, layer.hidden)
            down_size = (layer.num_experts, layer.hidden, layer.middle)
            make = functools.partial(torch.empty, dtype=torch.bfloat16, device=DEVICE)
            self.matrices = [make(size).normal_(0, 0.02) for size in (up_size, down_size)]
            self.wide = tuple(map(address_table, self.matrices))


def steps_of(layer: Layer, num_tokens: int) -> tuple[list[tuple[torch.Tensor, ...]], float]:
    """Rows, ids and weights of each step, and the mean number of experts that are hit."""
    torch.manual_seed(num_tokens)
    steps, hit = [], 0
    for _ in range(NUM_STEPS):
        x = torch.randn(num_tokens, layer.hidden, device=DEVICE).bfloat16()
        ids = torch.rand(num_tokens, layer.num_experts, device=DEVICE).topk(layer.top_k).indices
        weights = torch.full(ids.shape, 1 / layer.top_k, device=DEVICE).bfloat16()
        hit += len(ids.unique())
        steps.append((x, ids, weights))
    return steps, hit / NUM_STEPS


def narrow_calls(
    layer: Layer, weights: Weights, steps: Sequence[tuple[torch.Tensor, ...]]
) -> list[Callable[[], torch.Tensor]]:
    """The layer, step by step."""
    of = weights.table, layer.layout, layer.gate
    return [
        functools.partial(kernels.narrow_experts, *step, *of, biases=weights.biases)
        for step in steps
    ]


def run(layer: Layer, weights: Weights, num_tokens: int) -> dict[str, Any]:
    """One number of tokens."""
    steps, num_hit = steps_of(layer, num_tokens)
    calls = narrow_calls(layer, weights, steps)
    assert calls[0]().isfinite().all()
    times_us = replays_us(calls)
    took_us = statistics.median(times_us)
    wide_us = None
    if weights.wide is not None:
        fused = functools.partial(fused_experts, middle_size=layer.middle)
        wide_us = measure([functools.partial(fused, *step, *weights.wide) for step in steps])
    num_bytes = num_hit * layer.layout.weight_bytes
    rate = Rates.of_hardware(likely_hardware(DEVICE)).memory_bytes_per_s
    predicted_us = num_bytes / rate * 1e6 + LAUNCHES_US
    numbers = 3 * layer.hidden * layer.middle * num_tokens * layer.top_k
    return {
        "layer": layer.name,
        "format": layer.form.name,
        "tokens": num_tokens,
        **{f"us {name}": us for name, us in record.percentiles(times_us, digits=1).items()},
        "bfloat16 us": wide_us,
        "target us": dict(layer.targets_us).get(num_tokens),
        "predicted us": round(predicted_us, 1),
        "over predicted": round(took_us / predicted_us, 3),
        "weights GB/s": round(num_bytes / took_us / 1e3, 1),
        "TFLOP/s": round(2 * numbers / took_us / 1e6, 1),
    }


def made_for(layer: Layer) -> tuple[Weights, tuple[torch.Tensor, ...]]:
    """Weights and the inputs of one step, for `quant_tiles.compile_tiles`."""
    return Weights(layer, with_wide=False), steps_of(layer, 2)[0][0]


def swept(layers: Sequence[Layer], tokens: Sequence[int]) -> list[tuple[Layer, int, list[Tiles]]]:
    """What is tried."""
    return [
        (layer, num_tokens, quant_tiles.candidates(kind_of(layer.form), mean_rows))
        for layer in layers
        for num_tokens in tokens
        for mean_rows in [num_tokens * layer.top_k / layer.num_experts]
    ]


def sweep(layers: Sequence[Layer], tokens: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    """All tiles of each layer and number of tokens, the fastest first."""
    tried = swept(layers, tokens)
    jobs = {(layer.name, tiles): (layer, tiles) for layer, _, each in tried for tiles in each}
    quant_tiles.compile_all(list(jobs.values()), made_for)
    for layer in layers:
        weights = Weights(layer, with_wide=False)
        yield quant_tiles.reads(layer, weights)
        for each, num_tokens, all_tiles in tried:
            if each is layer:
                steps = steps_of(layer, num_tokens)[0]
                yield quant_tiles.sweep(layer, weights, steps, all_tiles)
        del weights
        torch.cuda.empty_cache()


def best(rows: Sequence[dict[str, Any]]) -> str:
    """The three fastest tiles of each product, a line each, short enough for a log's end."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("layer", "tokens", "product"))
        found.setdefault(key, []).append(row)
    return "\n".join(
        f"{row['layer']} {row['tokens']} {row['product']}: {row['us']} us, "
        f"{row['weights GB/s']} GB/s, {row['block rows']} rows, {row['tile']}"
        for each in found.values()
        for row in each[: 3 if each[0]["tokens"] else None]
    )


def as_page(result: dict[str, Any]) -> str:
    """A page of the results."""
    return f"# Experts in few bits\n\n{record.table(result['rows'])}\n\n{record.footer(result)}"


@torch.inference_mode()
def main() -> None:
    """Measure, print and write."""
    parser = record.arguments(__doc__, out="path of the results, without suffix")
    parser.add_argument("--tokens", default="1,16,64,256", help="numbers of tokens")
    parser.add_argument("--layers", default=",".join(layer.name for layer in LAYERS))
    parser.add_argument("--sweep", action="store_true", help="try tiles instead of comparing")
    parser.add_argument("--no-bf16", action="store_true", help="leave the wide layers out")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("an NVIDIA GPU is needed; this machine has none")
    asked = args.layers.split(",")
    if unknown := set(asked) - {layer.name for layer in LAYERS}:
        sys.exit(f"no layers {sorted(unknown)}; there are {[layer.name for layer in LAYERS]}")
    result = record.start(rows=[], seed=SEED)
    layers = [layer for layer in LAYERS if layer.name in asked]
    tokens = list(map(int, args.tokens.split(",")))
    if args.sweep:
        for found in sweep(layers, tokens):
            result["rows"] += found
            record.write(args.out, result, as_page(result))
        print(best(result["rows"]))
        return
    for layer in layers:
        weights = Weights(layer, with_wide=not args.no_bf16)
        for num_tokens in tokens:
            result["rows"].append(run(layer, weights, num_tokens))
            print(f"{layer.name}, {num_tokens} tokens done", file=sys.stderr, flush=True)
            record.write(args.out, result, as_page(result))
        del weights
        torch.cuda.empty_cache()
    print(as_page(result))


if __name__ == "__main__":
    main()
