"""One layer of experts in few bits on a GPU: its products by address, and what their bytes predict.

Random bits in the shapes and formats of gpt-oss-20b (MXFP4) and Qwen3-30B-A3B-FP8 (blocks), uniform
routing, all payloads on the device. Each time is that of a call among several with other tokens and
other experts, recorded as one CUDA graph, so that no weights are found in L2 which a model would
have to read. The prediction is the bytes of the experts hit over the rate of the device's memory,
and what its launches take. Compiling included it takes less than a minute.

    python benchmarks/quant_experts.py --out benchmarks/results/quant_experts_h200

writes `.json` and `.md`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import record
import torch
from fused_experts import measure

from hotset.cost.rates import Rates
from hotset.experts.narrow import NarrowLayout
from hotset.kernels.device import likely_hardware
from hotset.kernels.narrow_experts import narrow_experts
from hotset.kernels.narrow_forms import Gate
from hotset.weight_format import FP8_BLOCK, MXFP4, WeightFormat

DEVICE = torch.device("cuda")
NUM_STEPS = 6  # of a graph, with inputs of their own
LAUNCHES_US = 4 * 3.0  # of a layer within a graph: route, up, down, sum


@dataclass(frozen=True)
class Layer:
    """The sizes of a published model's layer."""

    name: str
    form: WeightFormat
    num_experts: int
    top_k: int
    hidden: int
    middle: int
    gate: Gate

    @property
    def layout(self) -> NarrowLayout:
        """Of one expert."""
        rows = (2 * self.middle,) if self.gate.alpha else (2, self.middle)
        up = (*rows, self.hidden)
        return NarrowLayout(up, (self.hidden, self.middle), self.form)


LAYERS = [
    Layer("gpt-oss-20b", MXFP4, 32, 4, 2880, 2880, Gate(1.702, 7.0)),
    Layer("Qwen3-30B-A3B-FP8", FP8_BLOCK, 128, 8, 2048, 768, Gate()),
]


def make_payloads(layer: Layer) -> torch.Tensor:
    """`[E, payload_bytes]` on the device, of random bits that are all numbers."""
    layout = layer.layout
    size = (layer.num_experts, layout.payload_bytes)
    payloads = torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE)
    for matrix in layout.matrices:
        codes, scales, _ = layout.views(payloads, matrix)
        if layer.form.code == "e4m3":
            codes.masked_fill_(codes & 127 == 127, 56)
            scales.fill_(2e-4)
        else:
            scales.fill_(120)
    return payloads


def run(layer: Layer, num_tokens: int) -> dict[str, Any]:
    """One number of tokens."""
    torch.manual_seed(num_tokens)
    payloads, layout = make_payloads(layer), layer.layout
    table = torch.tensor([row.data_ptr() for row in payloads], device=DEVICE)
    biases = None
    if layer.gate.alpha:
        up = torch.randn(layer.num_experts, 2 * layer.middle, device=DEVICE).bfloat16()
        biases = up, torch.randn(layer.num_experts, layer.hidden, device=DEVICE).bfloat16()
    calls: list[Callable[[], Any]] = []
    hit = 0
    for _ in range(NUM_STEPS):
        x = torch.randn(num_tokens, layer.hidden, device=DEVICE).bfloat16()
        scores = torch.rand(num_tokens, layer.num_experts, device=DEVICE)
        ids = scores.topk(layer.top_k).indices
        weights = torch.full(ids.shape, 1 / layer.top_k, device=DEVICE).bfloat16()
        hit += len(ids.unique())

        def call(x: Any = x, ids: Any = ids, weights: Any = weights) -> torch.Tensor:
            return narrow_experts(x, ids, weights, table, layout, layer.gate, biases=biases)

        assert call().isfinite().all()
        calls.append(call)
    took_us = measure(calls)
    num_bytes = hit / NUM_STEPS * layout.weight_bytes
    rate = Rates.of_hardware(likely_hardware(DEVICE)).memory_bytes_per_s
    predicted_us = num_bytes / rate * 1e6 + LAUNCHES_US
    return {
        "layer": layer.name,
        "format": layer.form.name,
        "tokens": num_tokens,
        "us": took_us,
        "predicted_us": round(predicted_us, 2),
        "over_predicted": round(took_us / predicted_us, 3),
        "gb_per_s": round(num_bytes / took_us / 1e3, 1),
        "tflops": round(
            6 * layer.hidden * layer.middle * num_tokens * layer.top_k / took_us / 1e6, 1
        ),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """A page of the results."""
    lines = [
        "# Experts in few bits",
        "",
        record.footer(result),
        "| layer | format | tokens | us | predicted us | over it | weights GB/s | TFLOP/s |",
        "|" + "---|" * 8,
    ]
    lines += [
        "| " + " | ".join(str(value) for value in row.values()) + " |" for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def main() -> None:
    """Measure, print and write."""
    parser = record.arguments(__doc__, out="path of the results, without suffix")
    parser.add_argument("--tokens", default="1,16,64,256,1024", help="numbers of tokens")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("an NVIDIA GPU is needed; this machine has none")
    result = record.start(rows=[])
    for layer in LAYERS:
        for num_tokens in map(int, args.tokens.split(",")):
            result["rows"].append(run(layer, num_tokens))
            print(f"{layer.name}, {num_tokens} tokens done", file=sys.stderr)
    record.write(args.out, result, as_markdown(result))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
