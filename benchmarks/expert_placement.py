"""Experts of MoE layers over several GPUs, by their place: in order, by turns, by measured load.

Layers of Qwen3-30B-A3B's shape in bfloat16. In each the experts' popularity has an order of its
own, as skewed as `experts/router_skew.py` makes it; placements are made from the routing of
64 steps and timed on other tokens. Every GPU holds the whole batch, computes its own experts' part
of it, and NCCL sums (`experts/parallel.py`). A time is that of a layer, the median of replays of
one CUDA graph of all layers; the loads are those of the tokens timed.

    python benchmarks/expert_placement.py --out benchmarks/results/expert_placement_2_h100
    python benchmarks/expert_placement.py --device cpu --ranks 2 --small --out /tmp/placement

writes `.json` and `.md`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import record
import torch
from torch import distributed, multiprocessing
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hotset.cost.routing import row_scales
from hotset.experts.gating import use_dynamic_gating
from hotset.experts.parallel import shard_experts
from hotset.experts.placement import Placement, in_order, measure, place, round_robin
from hotset.experts.weights import experts_layers

REPLAYS = 20
HISTORY_STEPS, HISTORY_TOKENS = 64, 256
SKEWS = (0.0, 0.45, 0.6)
NUM_COPIES = 8


def make_model(device: torch.device, *, is_small: bool) -> Any:
    """Layers with random experts, the same on every rank."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32} if is_small else {}
    config = Qwen3MoeConfig(
        **{"hidden_size": 2048, "moe_intermediate_size": 768, **sizes},
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=2 if is_small else 8,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=64,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    use_dynamic_gating(model)
    return model


class Routes:
    """Draws what routers choose, in each layer by its own popularity."""

    def __init__(self, skew: float, config: Any, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._top_k: int = config.num_experts_per_tok
        scales = torch.tensor(row_scales(config.num_experts, skew))
        orders = torch.Generator().manual_seed(1)
        self._scales = [
            scales[torch.randperm(len(scales), generator=orders)]
            for _ in range(config.num_hidden_layers)
        ]

    def draw(self, layer: int, num_tokens: int) -> torch.Tensor:
        """`[num_tokens, top_k]` ids."""
        scales = self._scales[layer]
        logits = torch.randn(num_tokens, len(scales), generator=self._generator) * scales
        return logits.topk(self._top_k).indices

    def counts(self, layer: int, num_tokens: int) -> list[int]:
        """Tokens of each expert in one step."""
        counts = self.draw(layer, num_tokens).view(-1).bincount(minlength=len(self._scales[layer]))
        return [int(count) for count in counts]


@dataclass(frozen=True)
class Batch:
    """Tokens on the device: `[T, H]`, and for each layer `[T, K]` ids; all weights are equal."""

    x: torch.Tensor
    ids: list[torch.Tensor]

    def through(self, layers: Sequence[Any]) -> list[torch.Tensor]:
        """What each layer makes of the tokens."""
        weights = self.x.new_full(self.ids[0].shape, 1 / self.ids[0].shape[1])
        return [
            layer.forward(self.x, ids, weights) for layer, ids in zip(layers, self.ids, strict=True)
        ]


def timed(
    run: Callable[[], list[torch.Tensor]], device: torch.device
) -> tuple[float, list[torch.Tensor]]:
    """Seconds of `run`, recorded, the median of replays, and its result; launched on a CPU."""
    is_gpu = device.type == "cuda"
    replay: Callable[[], object] = run
    out = run()
    run()
    if is_gpu:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        replay = graph.replay
    times = []
    for _ in range(REPLAYS):
        distributed.barrier()
        if is_gpu:
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        replay()
        if is_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times), [part.clone() for part in out]


def load_over_mean(placements: Sequence[Placement], batch: Batch) -> float:
    """Of the busiest device, mean over layers."""
    balances = []
    for placement, ids in zip(placements, batch.ids, strict=True):
        counts = ids.view(-1).bincount(minlength=len(placement.num_copies))
        balances.append(measure(placement, [counts.tolist()]))
    return statistics.fmean(balance.max_load / balance.mean_load for balance in balances)


def largest_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Of a layer, relative."""
    return max(
        float((out - one).float().norm() / one.float().norm())
        for out, one in zip(found, expected, strict=True)
    )


def measure_skew(
    skew: float, arguments: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """All placements of one skew."""
    model = make_model(device, is_small=arguments.small)
    config, ranks = model.config, arguments.ranks
    num_experts, num_layers = config.num_experts, config.num_hidden_layers
    seen, coming = Routes(skew, config, seed=2), Routes(skew, config, seed=3)
    history = [
        [seen.counts(layer, HISTORY_TOKENS) for _ in range(HISTORY_STEPS)]
        for layer in range(num_layers)
    ]
    batches = []
    for num_tokens in (16,) if arguments.small else (256, 8192):
        x = torch.randn(num_tokens, config.hidden_size, dtype=torch.bfloat16, device=device)
        distributed.broadcast(x, 0)
        ids = [coming.draw(layer, num_tokens).to(device) for layer in range(num_layers)]
        batches.append(Batch(x, ids))
    cases: dict[str, list[Placement]] = {
        "one device": [],
        "in order": [in_order(num_experts, ranks)] * num_layers,
        "by turns": [round_robin(num_experts, ranks)] * num_layers,
        "by load": [place(steps, ranks) for steps in history],
        f"by load, {NUM_COPIES} copies": [
            place(steps, ranks, num_replicas=NUM_COPIES) for steps in history
        ],
    }
    expected: dict[int, list[torch.Tensor]] = {}
    for name, placements in cases.items():
        if placements:
            model = make_model(device, is_small=arguments.small)
            shard_experts(model, placements)
        layers = [experts.module for experts in experts_layers(model)]
        for batch in batches:
            num_tokens = len(batch.x)
            seconds, found = timed(partial(batch.through, layers), device)
            error = largest_error(found, expected.setdefault(num_tokens, found))
            if not error < 0.02:
                raise SystemExit(f"{name} computes something else: {error:.3f} off")
            yield {
                "skew": skew,
                "tokens": num_tokens,
                "placement": name,
                "max_over_mean_load": load_over_mean(placements, batch) if placements else 1.0,
                "layer_ms": seconds / num_layers * 1e3,
                "error": error,
            }


def run_rank(rank: int, arguments: argparse.Namespace, meet: str) -> None:
    """One of the ranks; the first prints and writes."""
    is_gpu = arguments.device == "cuda"
    device = torch.device("cuda", rank) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if is_gpu else "gloo",
        init_method=f"file://{meet}/meet",
        rank=rank,
        world_size=arguments.ranks,
    )
    rows = []
    with torch.inference_mode():
        for skew in SKEWS:
            for row in measure_skew(skew, arguments, device):
                rows.append(row)
                if rank == 0:
                    print(row, flush=True)
    if rank == 0:
        write(arguments, rows)
    distributed.destroy_process_group()


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The record and its table."""
    found = record.start(seed=[1, 2, 3], rows=rows)
    found["command"] = arguments.command  # of the process that started this one
    lines = [
        f"{arguments.ranks} devices, ms a layer with the sum over them; in brackets the load of "
        f"the busiest over the mean. `{arguments.command}`",
        "",
        "| skew | tokens | " + " | ".join(dict.fromkeys(row["placement"] for row in rows)) + " |",
    ]
    lines.append("|---" * (lines[-1].count("|") - 1) + "|")
    for skew, tokens in dict.fromkeys((row["skew"], row["tokens"]) for row in rows):
        cells = [
            f"{row['layer_ms']:.3f} ({row['max_over_mean_load']:.2f})"
            for row in rows
            if (row["skew"], row["tokens"]) == (skew, tokens)
        ]
        lines.append(f"| {skew} | {tokens} | " + " | ".join(cells) + " |")
    record.write(arguments.out, found, "\n".join(lines) + "\n")


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, help="[default: as many as there are GPUs]")
    parser.add_argument("--small", action="store_true", help="Tiny layers, to try the script.")
    arguments = parser.parse_args()
    if arguments.ranks is None:
        arguments.ranks = torch.cuda.device_count()
    if arguments.ranks < 2:
        parser.error(f"2 devices or more are needed and there are {arguments.ranks}")
    arguments.command = "python " + " ".join(sys.argv)
    with tempfile.TemporaryDirectory() as meet:
        multiprocessing.spawn(run_rank, (arguments, meet), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
