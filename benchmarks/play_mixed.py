"""First tokens of short prompts among long ones, by the real scheduler on an H200's step times.

As `play_schedule.py`, whose model, sizes and step times these are, but requests come by a clock:
short ones of 100 tokens at random, 20 a second, and long ones of 7,000 that come `--num-long` at
once, every four seconds. No GPU is needed.

    python benchmarks/play_mixed.py --label after --out benchmarks/results/play_mixed.json

Adds its figures to FILE under the label.
"""

import random
from itertools import pairwise
from typing import Any

import record
from play_schedule import ALL_BLOCKS, BLOCK_BYTES, TRIALS, VOCAB_SIZE, make_model, step_s
from played import make_engine

from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.units import GIB

SECONDS = 40.0
SHORT_RATE, SHORT_TOKENS, SHORT_OUTPUT = 20.0, 100, 64
LONG_EVERY_S, LONG_TOKENS, LONG_OUTPUT = 4.0, 7000, 64


def arrivals(num_long: int) -> list[tuple[float, str]]:
    """When requests come, and of which kind."""
    rng = random.Random(0)
    found, now_s = [], 0.0
    while (now_s := now_s + rng.expovariate(SHORT_RATE)) < SECONDS:
        found.append((now_s, "short"))
    for i in range(int(SECONDS / LONG_EVERY_S)):
        found += [(1.0 + i * LONG_EVERY_S, "long")] * num_long
    return sorted(found)


def play(loaded: LoadedModel, num_long: int) -> dict[str, Any]:
    """All arrivals through a fresh engine, to their ends."""
    engine, executor = make_engine(
        Options.of(
            device="cpu",
            dtype="float32",
            hot_gib=(ALL_BLOCKS + 0.5) * BLOCK_BYTES / GIB,
            max_num_batched_tokens=8192,
            max_mixed_tokens=1024,
            max_model_len=8192,
        ),
        loaded,
        step_s,
        vocab_size=VOCAB_SIZE,
        trials=TRIALS,
        row_tile=256,
    )
    clock, tokens_s = executor.clock, engine.tokens_s
    rng = random.Random(1)
    sent: dict[str, tuple[float, str]] = {}
    waiting = arrivals(num_long)[::-1]
    while waiting or engine.has_work:
        if waiting and not engine.has_work:
            clock.now_s = max(clock.now_s, waiting[-1][0])
        while waiting and waiting[-1][0] <= clock.now_s:
            sent_s, kind = waiting.pop()
            is_long = kind == "long"
            prompt = [
                rng.randrange(VOCAB_SIZE) for _ in range(LONG_TOKENS if is_long else SHORT_TOKENS)
            ]
            params = SamplingParams(
                max_tokens=LONG_OUTPUT if is_long else SHORT_OUTPUT, ignore_eos=True
            )
            sent[engine.add_request(prompt, params)] = sent_s, kind
        engine.step()
    engine.close()
    found: dict[str, Any] = {"num_long": num_long, "seconds": round(clock.now_s, 2)}
    for kind in ("short", "long"):
        ids = [request_id for request_id, (_, one) in sent.items() if one == kind]
        ttft_s = [tokens_s[one][0] - sent[one][0] for one in ids]
        gaps_s = [b - a for one in ids for a, b in pairwise(tokens_s[one])]
        for name, values in (("ttft_ms", ttft_s), ("gap_ms", gaps_s)):
            if values:
                found[f"{kind}_{name}"] = record.percentiles(values, scale=1e3, digits=1)
    return found


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--label", required=True)
    arguments = parser.parse_args()
    loaded = make_model()
    found = record.start(seed=[0, 1], runs=[])  # of arrivals, of prompts
    for num_long in (0, 1, 4, 10):
        found["runs"].append(play(loaded, num_long))
        print(found["runs"][-1], flush=True)
    record.add(arguments.out, arguments.label, found)


if __name__ == "__main__":
    main()
