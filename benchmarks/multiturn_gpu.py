"""Multi-turn conversations whose KV does not fit: the engine with and without its host tier.

Workloads C3 and C6 of the field's comparison: N users in a closed loop without think time, each
turn sending the whole conversation and some new tokens as soon as the last one ended. Dummy
weights, random prompts, greedy. A512 is one turn with everything resident.

    python benchmarks/multiturn_gpu.py --workload A512 --arms hot --hot-gib 109.5
    python benchmarks/multiturn_gpu.py --workload C6 --arms hot,host
"""

import argparse
import bisect
import json
import platform
import random
import subprocess
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from hotset.config import EngineConfig
from hotset.engine.engine import Engine
from hotset.model.loader import LoadedModel
from hotset.request import SamplingParams

# first prompt, new tokens a turn, turns, output tokens a turn, index (of the seed)
WORKLOADS = {
    "C3": (1280, 256, 3, 64, 3),
    "C6": (896, 128, 6, 64, 6),
    "tiny": (96, 32, 3, 16, 0),
    "A512": (512, 0, 1, 256, 1),
}


@dataclass(slots=True)
class User:
    """One conversation: its tokens so far, and when each turn was sent and first answered."""

    tokens: list[int]
    turn: int = 0
    sent_s: float = 0.0
    first_s: float | None = None


STEP_SIZES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 2048, 4096, 1 << 30)


def dummy_model(name: str, device: str) -> LoadedModel:
    """A model of a bundled shape with random weights."""
    text = resources.files("hotset.plan").joinpath("models", f"{name}.json").read_text()
    fields: dict[str, Any] = json.loads(text)
    fields = fields.get("config", fields)
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return LoadedModel(model, None, name, f"dummy-{name}", (), config.max_position_embeddings)


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of `values` lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def run(engine: Engine, workload: str, num_users: int) -> dict[str, Any]:
    """All conversations to their end; throughput, latency and what was moved."""
    first, new, turns, out, index = WORKLOADS[workload]
    rng = random.Random(1000 + index)
    vocab = engine._sampler.vocab_size

    def more(n: int) -> list[int]:
        return [rng.randrange(1000, vocab - 1000) for _ in range(n)]

    users = {i: User(more(first)) for i in range(num_users)}
    params = SamplingParams(max_tokens=out, ignore_eos=True)
    of_request: dict[str, int] = {}
    ttft: list[list[float]] = [[] for _ in range(turns)]
    tpot: list[list[float]] = [[] for _ in range(turns)]
    total_tokens = 0
    start_s = time.perf_counter()
    steps_before = engine.metrics.steps

    def send(i: int) -> None:
        user = users[i]
        user.sent_s, user.first_s = time.perf_counter(), None
        of_request[engine.add_request(user.tokens, params)] = i

    for i in users:
        send(i)
    last_print_s = start_s
    steps_s: dict[int, list[float]] = {}
    while engine.has_work:
        step_start_s = time.perf_counter()
        computed_before = engine.metrics.computed_tokens
        outputs = engine.step()
        step_tokens = engine.metrics.computed_tokens - computed_before
        size = STEP_SIZES[bisect.bisect_left(STEP_SIZES, step_tokens)]
        steps_s.setdefault(size, []).append(time.perf_counter() - step_start_s)
        for output in outputs:
            i = of_request[output.request_id]
            user = users[i]
            now_s = time.perf_counter()
            if output.token_ids and user.first_s is None:
                user.first_s = now_s
                ttft[user.turn].append(now_s - user.sent_s)
            if not output.token_ids and output.error:
                raise SystemExit(output.error)
            user.tokens.extend(output.token_ids)
            if output.finish_reason is not None:
                assert user.first_s is not None
                tpot[user.turn].append((now_s - user.first_s) / (out - 1))
                total_tokens += len(user.tokens)
                user.turn += 1
                if user.turn < turns:
                    user.tokens += more(new)
                    send(i)
        if time.perf_counter() - last_print_s > 10:
            last_print_s = time.perf_counter()
            done = sum(user.turn for user in users.values())
            print(f"  {last_print_s - start_s:5.0f} s, {done} turns done", flush=True)
    wall_s = time.perf_counter() - start_s
    metrics = engine.metrics
    return {
        "wall_s": wall_s,
        "total_tokens_per_s": total_tokens / wall_s,
        "output_tokens_per_s": num_users * turns * out / wall_s,
        "ttft_mean_by_turn_s": [mean(values) for values in ttft],
        "ttft_p99_by_turn_s": [percentile(values, 0.99) for values in ttft],
        "tpot_mean_by_turn_s": [mean(values) for values in tpot],
        "steps": metrics.steps - steps_before,
        "steps_by_size": {
            f"up to {size} tokens": {
                "steps": len(seconds),
                "sum_s": sum(seconds),
                "median_s": percentile(seconds, 0.5),
                "p95_s": percentile(seconds, 0.95),
            }
            for size, seconds in sorted(steps_s.items())
        },
        "preemptions": metrics.preemptions,
        "computed_tokens": metrics.computed_tokens,
        "cached_tokens": dict(metrics.cached_tokens),
        "moved_bytes": dict(metrics.moved_bytes),
        "faults": dict(metrics.faults),
        "rates": {
            "prefill_tokens_per_s": engine.rates.prefill_tokens_per_s,
            "link_gb_per_s": {k: v / 1e9 for k, v in engine.rates.link_bytes_per_s.items()},
        },
    }


def main() -> None:
    """Run the arms one after the other on the same model and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="C6")
    parser.add_argument("--arms", default="hot,host")
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--hot-gib", type=float, default=16.0)
    parser.add_argument("--host-gib", type=float, default=64.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mixed", type=int, default=1024)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    loaded = dummy_model(args.model, args.device)
    results: dict[str, Any] = {}
    for arm in args.arms.split(","):
        config = EngineConfig(
            hot_gib=args.hot_gib,
            host_gib=args.host_gib if arm == "host" else 0.0,
            max_num_batched_tokens=8192,
            max_mixed_tokens=args.mixed,
            max_model_len=8192,
            eager=args.eager,
        )
        start_s = time.perf_counter()
        engine = Engine(config, loaded)
        print(f"{arm}: started in {time.perf_counter() - start_s:.1f} s\n{engine.report}")
        ready_s = time.perf_counter()
        while engine._tiers and engine._tiers.host.num_slots < engine.budget.host_slots:
            engine.kv.poll()
            time.sleep(0.02)
        print(f"all of the host tier is ready {time.perf_counter() - ready_s:.1f} s later")
        run(engine, "tiny", 16)  # warm-up
        results[arm] = run(engine, args.workload, args.users)
        engine.close()
        print(arm, json.dumps(results[arm]), flush=True)
        if args.out:
            args.out.write_text(
                json.dumps(
                    {"args": {k: str(v) for k, v in vars(args).items()}, "results": results},
                    indent=1,
                )
            )
        del engine
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    record = {
        "args": {key: str(value) for key, value in vars(args).items()},
        "commit": commit.stdout.strip(),
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": results,
    }
    if len(results) == 2:
        walls = [result["wall_s"] for result in results.values()]
        record["ratio"] = walls[0] / walls[1]
        print(f"{args.workload}: {walls[0]:.2f} s / {walls[1]:.2f} s = {walls[0] / walls[1]:.2f}")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
