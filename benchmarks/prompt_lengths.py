"""Memory of a CPU engine that sees a new prompt length with every request.

oneDNN compiles code for each number of rows and keeps it, and so does PyTorch's layer above it. A
tiny model answers prompts of all lengths from 1 to N tokens, in random order, one after another, in
two processes:

- `kept by default`: with the numbers of entries that both libraries keep by default, 1024.
- `hotset`: with the numbers that hotset sets.

    python benchmarks/prompt_lengths.py --out benchmarks/results/prompt_lengths

writes `.json` and `.md`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from typing import Any

import psutil
import record

DEFAULTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
ARMS: dict[str, dict[str, str]] = {"kept by default": DEFAULTS, "hotset": {}}
SHOWN = (1, 10, 50, 100, 200, 500, 1000, 1500, 2000)
MIB = 2**20


def measure(family: str, num_lengths: int, threads: int) -> dict[str, Any]:
    """In a process of its own: resident memory by the number of lengths seen."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hotset.engine.build import build_engine
    from hotset.engine.run import run_to_end
    from hotset.model.loaded import LoadedModel
    from hotset.options import Options
    from hotset.request import SamplingParams

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
    }
    if family == "qwen3_moe":
        sizes |= {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    loaded = LoadedModel(model, None, family, family, (), 4096)
    engine = build_engine(Options.of(hot_gib=0.02, prefix_caching=False), loaded)
    process = psutil.Process()
    rss_mib, start_s = {0: round(process.memory_info().rss / MIB, 1)}, time.perf_counter()
    lengths = random.Random(0).sample(range(1, num_lengths + 1), num_lengths)
    for seen, length in enumerate(lengths, 1):
        engine.add_request([1 + i % 255 for i in range(length)], SamplingParams(max_tokens=1))
        for _ in run_to_end(engine):
            pass
        rss_mib[seen] = round(process.memory_info().rss / MIB, 1)
    return {
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "rss_mib": rss_mib,
        "wall_s": time.perf_counter() - start_s,
    }


def run_arm(name: str, args: argparse.Namespace) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k not in DEFAULTS} | ARMS[name]
    words = [f"--lengths={args.lengths}", f"--threads={args.threads}", f"--family={args.family}"]
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *words],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = record.arguments(__doc__, out="path of the results, without suffix")
    parser.add_argument("--lengths", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--family", choices=["llama", "qwen3_moe"], default="llama")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.family, args.lengths, args.threads)))
        return
    arms = {name: run_arm(name, args) for name in ARMS}
    result = record.start(seed=0, family=args.family, threads=args.threads, arms=arms)
    print(page := make_page(result))
    record.write(args.out, result, page)


def make_page(result: dict[str, Any]) -> str:
    arms = result["arms"]
    last = max(int(seen) for seen in arms["hotset"]["rss_mib"])
    shown = [seen for seen in SHOWN if seen <= last]
    rows = "\n".join(
        f"| {name} | "
        + " | ".join(f"{arm['rss_mib'][str(seen)]:,.0f}" for seen in shown)
        + f" | {arm['wall_s']:.1f} |"
        for name, arm in arms.items()
    )
    return f"""# Memory of a CPU engine by the prompt lengths it has seen

A random {result["family"]} of {arms["hotset"]["model_bytes"] / MIB:.1f} MiB, float32, one prompt of
each length from 1 to {last} tokens, in random order, one after another. Resident memory of the
process in MiB, by the number of lengths that it has seen:

| entries kept | {" | ".join(f"{seen:,}" for seen in shown)} | all, s |
|---|{"---|" * len(shown)}---|
{rows}

{record.footer(result)}"""


if __name__ == "__main__":
    main()
