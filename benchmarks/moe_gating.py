"""Static gating (GShard, fairseq) against dynamic gating, for one MoE layer.

    python benchmarks/moe_gating.py --out benchmarks/results/moe_gating_cpu
    python benchmarks/moe_gating.py --device cuda --experts 512 --hidden 1024 --ffn 4096 \
        --top-k 2 --max-tokens 65536 --out benchmarks/results/moe_gating_h200

The first is for a CPU; the second is the shape of the paper. Each writes `.json` and `.md`.
"""

import argparse
import sys
from pathlib import Path

import torch

from hotset.bench.machine import describe_machine
from hotset.bench.moe_gating import CAPACITY_FACTORS, Shape, as_markdown, compare, write
from hotset.errors import HotsetError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--factors", type=float, nargs="+", default=CAPACITY_FACTORS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--memory-gib", type=float, help="beside the weights; on a CPU 1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device; take --device cpu")
    try:
        result = compare(
            Shape(args.experts, args.hidden, args.ffn, args.top_k),
            device=args.device,
            dtype=torch.bfloat16 if args.device == "cuda" else torch.float32,
            factors=args.factors,
            max_tokens=args.max_tokens,
            memory_gib=args.memory_gib,
            repeats=args.repeats,
        )
    except HotsetError as error:
        sys.exit(f"error: {error}")
    machine = describe_machine()
    del machine["command"]  # which is that of `hotset`
    result["command"] = "python " + " ".join(sys.argv)
    result["machine"] = machine
    write(result, args.out)
    print(as_markdown(result), end="")


if __name__ == "__main__":
    main()
