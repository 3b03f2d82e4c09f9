"""What a front and its link cost beside `hotset serve`: CPU per token, and time to the first token.

    python benchmarks/fleet_front.py --out benchmarks/results/fleet_front

`hotset serve` and `hotset front` with one `hotset replica` serve the same model, by turns; the one
that waits costs next to nothing. In a turn of `load` all users stream at once. In `ttft` single
requests go to one and the other, and the difference of each pair is taken.
"""

import argparse
import asyncio
import signal
import statistics
import tempfile
from pathlib import Path
from typing import Any

import record
from fleet_processes import Processes, prompts, small_model, stream


async def load(port: int, users: int, tokens: int, seed: int) -> int:
    """All users at once; returns the tokens that came."""
    texts = prompts(users, 8, seed)
    answers = await asyncio.gather(*(stream(port, text, tokens) for text in texts))
    for answer in answers:
        if answer.error or len(answer.token_ids) != tokens:
            raise SystemExit(f"{len(answer.token_ids)} of {tokens} tokens: {answer.error}")
    return users * tokens


def loads(args: argparse.Namespace, processes: Processes, ports: dict[str, int]) -> list[Any]:
    """CPU time per token of each process, turn by turn."""
    turns = []
    for turn in range(-1, args.turns):  # the first warms all up
        row: dict[str, float] = {}
        for kind, names in (("serve", ("serve",)), ("fleet", ("front", "replica-0"))):
            before = [processes.cpu_s(name) for name in names]
            tokens = asyncio.run(load(ports[kind], args.users, args.tokens, turn + 1))
            for name, (own, others), old in zip(
                names, map(processes.cpu_s, names), before, strict=True
            ):
                row[f"{name}_us"] = 1e6 * (own - old[0]) / tokens
                row[f"{name}_engine_us"] = 1e6 * (others - old[1]) / tokens
        row["added_us"] = row["front_us"] + row["replica-0_us"] - row["serve_us"]
        record.say(f"load {turn}: " + ", ".join(f"{k} {v:.1f}" for k, v in row.items()))
        if turn >= 0:
            turns.append(row)
    return turns


async def ttfts(ports: dict[str, int], words: int, pairs: int) -> dict[str, Any]:
    """Of single requests with prompts that were not seen before, in ms."""
    times_ms: dict[str, list[float]] = {kind: [] for kind in ports}
    for i, text in enumerate(prompts(pairs + 3, words, 1000 + words)):
        for kind in sorted(ports, reverse=bool(i % 2)):
            answer = await stream(ports[kind], text, 2)
            if answer.error:
                raise SystemExit(answer.error)
            if i >= 3:
                times_ms[kind].append(1e3 * answer.ttft_s)
    added = [b - a for a, b in zip(times_ms["serve"], times_ms["fleet"], strict=True)]
    return {
        "words": words,
        "pairs": pairs,
        **{f"{kind}_ms": record.percentiles(times, digits=2) for kind, times in times_ms.items()},
        "added_ms_p50": round(statistics.median(added), 2),
    }


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    median = result["load_median"]
    rows = [
        {"process": "`hotset serve`: HTTP", "us of CPU per token": median["serve_us"]},
        {"process": "`hotset front`", "us of CPU per token": median["front_us"]},
        {"process": "`hotset replica`: link", "us of CPU per token": median["replica-0_us"]},
        {"process": "front + link - serve", "us of CPU per token": median["added_us"]},
        {"process": "engine of serve", "us of CPU per token": median["serve_engine_us"]},
        {"process": "engine of the replica", "us of CPU per token": median["replica-0_engine_us"]},
    ]
    firsts = [
        {
            "words of the prompt": one["words"],
            "serve p50, ms": one["serve_ms"]["p50"],
            "fleet p50, ms": one["fleet_ms"]["p50"],
            "serve p99, ms": one["serve_ms"]["p99"],
            "fleet p99, ms": one["fleet_ms"]["p99"],
            "added, p50 of pairs, ms": one["added_ms_p50"],
        }
        for one in result["ttft"]
    ]
    return (
        "# A front and its link beside `hotset serve`\n\n"
        f"{result['users']} streams of {result['tokens']} tokens at once, {result['turns']} turns "
        "each, medians. The engine of both runs the same model, two layers with random weights.\n\n"
        f"{record.table(rows)}\n\n"
        "Time to the first token of single requests, one to each by turns:\n\n"
        f"{record.table(firsts)}\n\n{record.footer(result)}"
    )


def main() -> None:
    parser = record.arguments(__doc__ or "", out="results, without suffix")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=60)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: exit(1))  # all that was started ends with this
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(Path(folder) / "model")
        flags = ["--model", str(model), "--hot-gib", "0.5", "--max-num-seqs", str(args.users)]
        flags += ["--max-model-len", "8192"]
        with Processes(Path(folder), flags) as processes:
            processes.start_replica("replica-0")
            ports = {"serve": processes.start_serve()}
            processes.wait_for_replicas("replica-0")
            ports["fleet"] = processes.start_front()
            turns = loads(args, processes, ports)
            firsts = [asyncio.run(ttfts(ports, words, args.pairs)) for words in (8, 200)]
    median = {name: round(statistics.median(t[name] for t in turns), 2) for name in turns[0]}
    shown = {"users": args.users, "tokens": args.tokens, "turns": args.turns}
    result = record.start(seed=0, **shown, load=turns, load_median=median, ttft=firsts)
    record.write(args.out, result, page(result))
    print(page(result))


if __name__ == "__main__":
    main()
