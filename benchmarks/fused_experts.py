"""Fused experts on a GPU against PyTorch's grouped products, and the tiles that suit it best.

One layer of Qwen3-30B-A3B's shape in bfloat16, all experts resident, uniform routing. Each time is
that of a call among several with other tokens and other experts, recorded as one CUDA graph, so
that no weights are found in L2 which a model would have to read.

    python benchmarks/fused_experts.py --out benchmarks/results/fused_experts_h200
    python benchmarks/fused_experts.py --sweep --tokens 1,16,64,256 --out /tmp/tiles

writes `.json` and `.md`. `--sweep` tries tiles for each product and takes some minutes, most of
them in Triton's compiler.
"""

import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import record
import torch
import triton
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hotset.cost.tuning import Tile, Tiles
from hotset.experts import compute
from hotset.experts.compute import address_table
from hotset.experts.gating import dynamic_experts
from hotset.experts.weights import IMPLEMENTATION
from hotset.kernels.expert_routing import route_rows
from hotset.kernels.fused_experts import gated_up, sum_rows, tiles_for, weighted_down

DEVICE = torch.device("cuda")
NUM_EXPERTS, HIDDEN, MIDDLE, TOP_K = 128, 2048, 768, 8
MOST_ROWS_RECORDED = 131072  # of all calls of a graph, so that their memory is small
REPLAYS = 20
SWEPT_ROWS = {16: (0.0, 24.0), 32: (4.0, 48.0), 64: (16.0, 128.0), 128: (32.0, float("inf"))}
SWEPT = [
    Tile(columns, depth, num_warps=4, num_stages=num_stages)
    for columns in (64, 128)
    for depth, num_stages in ((64, 3), (64, 4), (64, 5), (128, 2), (128, 3), (128, 4))
]
SWEPT_WIDE = [
    Tile(256, depth, num_warps, num_stages)
    for num_warps in (4, 8)
    for depth, num_stages in ((64, 3), (64, 4), (128, 2), (128, 3))
]
MOST_SUMS = 128  # of a thread; with more of them its registers do not suffice
ANY_TILE = Tile(64, 64, num_warps=4, num_stages=3)

Call = Callable[[], Any]


class Step:
    """One step's input, and the fused kernels over it one by one."""

    def __init__(self, layer: Any, num_tokens: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.layer = layer
        self.x = torch.randn(num_tokens, HIDDEN, device=DEVICE, dtype=layer.down_proj.dtype)
        scores = torch.randn(num_tokens, NUM_EXPERTS, device=DEVICE)
        weights, self.ids = scores.softmax(-1).topk(TOP_K)
        self.weights = (weights / weights.sum(-1, keepdim=True)).to(self.x.dtype)
        self.num_experts_hit = len(self.ids.unique())
        self.middle = self.x.new_empty(num_tokens * TOP_K, MIDDLE)
        self.rows = self.x.new_empty(num_tokens * TOP_K, HIDDEN)
        self.out = torch.empty_like(self.x)

    def whole(self) -> torch.Tensor:
        """As a model calls it."""
        return dynamic_experts(self.layer, self.x, self.ids, self.weights)

    def route(self, block_rows: int) -> None:
        """Sort the rows."""
        self.routing = route_rows(self.ids.view(-1), NUM_EXPERTS, block_rows)

    def up(self, tiles: Tiles) -> None:
        """Compute the first product."""
        table = address_table(self.layer.gate_up_proj)
        gated_up(self.x, self.routing, table, self.middle, top_k=TOP_K, tiles=tiles)

    def down(self, tiles: Tiles) -> None:
        """Compute the second product."""
        table = address_table(self.layer.down_proj)
        weighted_down(self.middle, self.routing, table, self.weights, self.rows, tiles=tiles)

    def sum(self) -> None:
        """Add the rows of each token."""
        sum_rows(self.rows, self.ids, self.out, num_experts=NUM_EXPERTS)


def measure(calls: Sequence[Call]) -> float:
    """Microseconds of a call, median of replays of all as one graph."""
    return round(statistics.median(replays_us(calls)), 2)


def replays_us(calls: Sequence[Call]) -> list[float]:
    """Microseconds of a call in each replay of all as one graph."""
    for call in calls[:2]:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times_us = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_us.append(start.elapsed_time(end) * 1e3 / len(calls))
    return times_us


def compare(layer: Any, num_tokens: int) -> dict[str, Any]:
    """Both ways for one number of tokens, and the parts of the fused one."""
    steps = make_steps(layer, num_tokens)
    num_rows = num_tokens * TOP_K
    tiles = tiles_for(num_rows, NUM_EXPERTS, DEVICE)
    most_rows = compute.FUSED_MOST_ROWS_PER_EXPERT
    way_us = {}
    try:
        for way, most in (("fused", num_rows), ("grouped_mm", 0)):
            compute.FUSED_MOST_ROWS_PER_EXPERT = most
            way_us[way] = measure([step.whole for step in steps])
    finally:
        compute.FUSED_MOST_ROWS_PER_EXPERT = most_rows
    for step in steps:
        step.route(tiles.block_rows)
    part_us = {
        "route": measure([lambda s=s: s.route(tiles.block_rows) for s in steps]),
        "up": measure([lambda s=s: s.up(tiles) for s in steps]),
        "down": measure([lambda s=s: s.down(tiles) for s in steps]),
        "sum": measure([step.sum for step in steps]),
    }
    return {
        "tokens": num_tokens,
        "tiles": str(tiles),
        "fused_us": way_us["fused"],
        "grouped_mm_us": way_us["grouped_mm"],
        "faster_by": round(way_us["grouped_mm"] / way_us["fused"], 3),
        "fused_parts_us": part_us,
        **rates(layer, steps, way_us["fused"], 3),
    }


def sweep(layer: Any, num_tokens: int) -> dict[str, Any]:
    """Each product with all tiles that make sense for so many rows, the fastest first."""
    steps = make_steps(layer, num_tokens)
    mean_rows = num_tokens * TOP_K / NUM_EXPERTS
    found: dict[str, list[dict[str, Any]]] = {"up": [], "down": []}
    sums = {}
    for block_rows, (least, most) in SWEPT_ROWS.items():
        if not least <= mean_rows <= most:
            continue
        for step in steps:
            step.route(block_rows)
        for tile in (*SWEPT, *SWEPT_WIDE):
            if block_rows * tile.columns > MOST_SUMS * 32 * tile.num_warps:
                continue
            tiles = Tiles(block_rows, up=tile, down=tile)
            for name, matrices in (("up", 2), ("down", 1)):
                calls = [lambda s=s, n=name, t=tiles: getattr(s, n)(t) for s in steps]
                try:
                    took_us = measure(calls)
                except triton.runtime.errors.OutOfResources:
                    continue
                row = {"block_rows": block_rows, "tile": str(tile), "us": took_us}
                found[name].append(row | rates(layer, steps, took_us, matrices))
        tiles = Tiles(block_rows, up=ANY_TILE, down=ANY_TILE)
        steps[0].up(tiles)
        steps[0].down(tiles)
        sums[block_rows] = steps[0].rows.clone()
    for rows in found.values():
        rows.sort(key=lambda row: row["us"])
    same_bits = {
        f"{one} and {other}": torch.equal(sums[one], sums[other])
        for one, other in itertools.combinations(sums, 2)
    }
    return {"tokens": num_tokens, "same_bits_for_block_rows": same_bits, **found}


def make_steps(layer: Any, num_tokens: int) -> list[Step]:
    count = max(2, min(16, MOST_ROWS_RECORDED // (num_tokens * TOP_K)))
    return [Step(layer, num_tokens, seed) for seed in range(count)]


def rates(layer: Any, steps: Sequence[Step], took_us: float, matrices: int) -> dict[str, float]:
    """What a call reads of weights and computes a second; `matrices` of the three."""
    mean_hit = statistics.mean(step.num_experts_hit for step in steps)
    numbers = matrices * HIDDEN * MIDDLE
    rows = len(steps[0].x) * TOP_K
    return {
        "weights_tb_per_s": round(mean_hit * numbers * 2 / took_us / 1e6, 3),
        "tflop_per_s": round(2 * rows * numbers / took_us / 1e6, 1),
    }


def make_layer() -> Any:
    config = Qwen3MoeConfig(
        num_experts=NUM_EXPERTS,
        hidden_size=HIDDEN,
        moe_intermediate_size=MIDDLE,
        num_experts_per_tok=TOP_K,
        hidden_act="silu",
    )
    config._experts_implementation = IMPLEMENTATION
    with torch.device(DEVICE):
        layer = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    for weight in layer.parameters():
        weight.normal_(0, HIDDEN**-0.5)
    return layer


def as_markdown(result: dict[str, Any]) -> str:
    lines = ["# Fused experts", "", record.footer(result)]
    if "compared" in result:
        lines += [
            "| tokens | fused us | `grouped_mm` us | faster by | weights TB/s | TFLOP/s "
            "| route | up | down | sum |",
            "|" + "---|" * 10,
        ]
        for row in result["compared"]:
            parts = " | ".join(str(us) for us in row["fused_parts_us"].values())
            lines.append(
                f"| {row['tokens']} | {row['fused_us']} | {row['grouped_mm_us']} "
                f"| {row['faster_by']} | {row['weights_tb_per_s']} | {row['tflop_per_s']} "
                f"| {parts} |"
            )
    for swept in result.get("swept", ()):
        lines += ["", f"## {swept['tokens']} tokens", ""]
        lines.append(f"Same bits for block rows: {swept['same_bits_for_block_rows']}")
        for name in ("up", "down"):
            lines += ["", f"| {name} | tile | us | weights TB/s | TFLOP/s |", "|" + "---|" * 5]
            lines += [
                f"| {row['block_rows']} | {row['tile']} | {row['us']} "
                f"| {row['weights_tb_per_s']} | {row['tflop_per_s']} |"
                for row in swept[name][:6]
            ]
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def main() -> None:
    parser = record.arguments(__doc__, out="path of the results, without suffix")
    parser.add_argument(
        "--tokens", default="1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192,16384"
    )
    parser.add_argument("--sweep", action="store_true", help="try tiles instead of comparing")
    args = parser.parse_args()
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        sys.exit("an NVIDIA GPU is needed; this machine has none")
    layer = make_layer()
    result = record.start(shape={"E": NUM_EXPERTS, "H": HIDDEN, "I": MIDDLE, "K": TOP_K})
    rows = result.setdefault("swept" if args.sweep else "compared", [])
    for num_tokens in map(int, args.tokens.split(",")):
        rows.append((sweep if args.sweep else compare)(layer, num_tokens))
        print(f"{num_tokens} tokens done", file=sys.stderr)
        record.write(args.out, result, as_markdown(result))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
