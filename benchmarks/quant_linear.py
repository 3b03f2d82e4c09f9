"""Linear layers in few bits on a GPU: both of their products, beside bfloat16 and the bytes.

The four products of a layer of Llama-3.1-8B with random bits, over row counts. Each time is of one
product among several with weights of their own, recorded as one CUDA graph, so that no weights are
found in L2 which a model would have to read. `in registers` widens them there, `widened` once per
call, and `chosen` is what a model's layer runs. `x_8` has inputs in 8 bits: `in registers` is our
kernel then, and `chosen` PyTorch's product for many rows. Takes about three minutes.

    python benchmarks/quant_linear.py --out benchmarks/results/quant_linear_h200

writes `.json` and `.md`. `--trial` only compares the products with widened weights.
"""

import functools
import sys
from dataclasses import replace
from typing import Any

import record
import torch
from fused_experts import measure

from hotset.cost.rates import Rates
from hotset.kernels.device import likely_hardware
from hotset.kernels.narrow_linear import narrow_linear, widen_matrix
from hotset.linear.narrow_matrix import NarrowMatrix
from hotset.linear.quant_linear import check, key_of, quant_matrix, quant_product, random_payload
from hotset.weight_format import AWQ_128, FP8_BLOCK, FP8_ROW, INT4_128

DEVICE, SEED = torch.device("cuda"), 0
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
FORMS = {
    "fp8": FP8_ROW,
    "fp8_block": FP8_BLOCK,
    "fp8_x_8": replace(FP8_ROW, input_bits=8),
    "fp8_block_x_8": replace(FP8_BLOCK, input_bits=8),
    "int4": INT4_128,
    "awq": AWQ_128,
}
L2_BYTES = 128e6  # of codes that a graph reads at least
MOST_COPIES = 8


def widen_then_multiply(x: torch.Tensor, payload: torch.Tensor, matrix: NarrowMatrix) -> Any:
    """The way of many rows."""
    return torch.nn.functional.linear(x, widen_matrix(payload, matrix, x.dtype))


def run(shape: str, form: str, num_rows: int) -> dict[str, Any]:
    """Microseconds of each way."""
    matrix = quant_matrix(FORMS[form], SHAPES[shape])
    generator = torch.Generator().manual_seed(SEED)
    one = random_payload(matrix, generator).to(DEVICE)
    copies = min(MOST_COPIES, 1 + int(L2_BYTES // matrix.end))
    payloads = [one.clone() for _ in range(copies)]
    wide = [matrix.widened(one, torch.bfloat16) for _ in range(copies)]
    x = torch.randn(num_rows, SHAPES[shape][1], device=DEVICE).bfloat16()

    def times(function: Any, weights: list[torch.Tensor], *more: Any) -> float:
        return measure([functools.partial(function, x, weight, *more) for weight in weights])

    plain_us = times(torch.nn.functional.linear, wide)
    chosen_us = times(quant_product, payloads, key_of(matrix))
    rate = Rates.of_hardware(likely_hardware(DEVICE)).memory_bytes_per_s
    floor_us = matrix.end / rate * 1e6
    return {
        "product": shape,
        "format": form,
        "rows": num_rows,
        "bfloat16 us": plain_us,
        "in registers us": times(narrow_linear, payloads, matrix),
        "widened us": times(widen_then_multiply, payloads, matrix),
        "chosen us": chosen_us,
        "of bfloat16's speed": round(plain_us / chosen_us, 3),
        "bytes over rate us": round(floor_us, 1),
        "over that": round(chosen_us / floor_us, 2),
    }


def as_page(result: dict[str, Any]) -> str:
    """A page of the results."""
    return (
        f"# Linear layers in few bits\n\n{record.table(result['rows'])}\n\n{record.footer(result)}"
    )


@torch.inference_mode()
def main() -> None:
    """Measure, print and write."""
    parser = record.arguments(__doc__, out="path of the results, without suffix")
    parser.add_argument("--rows", default="1,16,64,256,2048,8192")
    parser.add_argument("--formats", default=",".join(FORMS))
    parser.add_argument("--trial", action="store_true", help="compare the products, time nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("an NVIDIA GPU is needed; this machine has none")
    for form in args.formats.split(","):
        for dtype in (torch.bfloat16, torch.float16):
            print(f"{form}, {dtype}: {check(FORMS[form], dtype, DEVICE) or 'right'}", flush=True)
    if args.trial:
        return
    result = record.start(rows=[], seed=SEED)
    for form in args.formats.split(","):
        for shape in SHAPES:
            for num_rows in map(int, args.rows.split(",")):
                result["rows"].append(run(shape, form, num_rows))
            print(f"{form}, {shape} done", file=sys.stderr, flush=True)
            record.write(args.out, result, as_page(result))
    print(as_page(result))


if __name__ == "__main__":
    main()
