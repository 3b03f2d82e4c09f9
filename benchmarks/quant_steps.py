"""Whole steps of Mixtures of Experts in few bits on one GPU, beside what the planner says of them.

Random weights in the real formats, made on the device in seconds; the engine's own steps, prompts
and decodes, by the number of users. One case per call, each of less than 200 s once FlashInfer's
kernels are compiled, which the first call may need minutes for:

    python benchmarks/quant_steps.py --case gpt-oss-120b --out FILE
    python benchmarks/quant_steps.py --case gpt-oss-120b-40 --out FILE
    python benchmarks/quant_steps.py --case qwen3-fp8-24 --router-skew 0.45 --out FILE

Cases that end in a number have that many GiB for everything (`--total-gib`), the others have all
experts resident. Results of other labels stay in the file. A target is the design's.
"""

import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import narrow_models
import record
import torch

from hotset.bench.machine import release
from hotset.bench.steady import SteadyRun
from hotset.bench.workload import Spec, make_work
from hotset.cost.expert_steps import ExpertCost, Load, link_of
from hotset.cost.tuning import TUNINGS
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.model_shape import make_cost_model
from hotset.engine.run import settle
from hotset.engine.start_times import Phase, StartTimes
from hotset.executor.probe import ModelLayout, inspect_model
from hotset.expert_options import HostedExperts
from hotset.experts.sizes import slot_bytes_of
from hotset.kernels.device import likely_hardware
from hotset.model.dummy import load_dummy
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import SamplingParams

SEED = 0
FIRST_TOKENS, STEPS, MARGIN = 64, 48, 64  # of prompts; timed; and of answers beside them
PROMPT_TOKENS, NUM_PROMPTS = 8192, 4  # the first one warms up
MAX_STEP_TOKENS = 8192
MIXED_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """A model and the memory for it.

    Attributes:
        total_gib: for everything; None has all experts resident.
        targets_ms: of a step, by users.
        prompt_target_ms: of a prompt of `PROMPT_TOKENS`.
    """

    model: str
    quantisation: str | None = None
    total_gib: float | None = None
    users: tuple[int, ...] = (1, 16, 64, 256)
    targets_ms: dict[int, float] = field(default_factory=dict)
    prompt_target_ms: float | None = None

    def options(self, eviction: str) -> Options:
        """Of an engine."""
        most = max(self.users)
        options: dict[str, Any] = {
            "max_num_seqs": most,
            "max_num_batched_tokens": MAX_STEP_TOKENS,
            "max_model_len": PROMPT_TOKENS + 64,
            "prefix_caching": False,
        }
        if self.total_gib is None:
            return Options.of(**options)
        target = "latency" if most <= 16 else "throughput"
        return Options.of(
            **options,
            total_gib=self.total_gib,
            target=target,
            expected_users=most,
            expected_prompt_tokens=FIRST_TOKENS,
            expected_output_tokens=STEPS + MARGIN,
            expert_eviction=eviction,
        )


OSS, QWEN = "gpt-oss-120b", "qwen3-30b-a3b"
CASES = {
    "gpt-oss-20b": Case("gpt-oss-20b", targets_ms={1: 2.0, 16: 4.22, 64: 4.82, 256: 5.9}),
    "gpt-oss-120b": Case(OSS, targets_ms={1: 2.8, 16: 9.14, 64: 17.4, 256: 20.7}),
    "gpt-oss-120b-40": Case(
        OSS, total_gib=40, users=(1, 16), targets_ms={1: 20, 16: 230}, prompt_target_ms=550
    ),
    "gpt-oss-120b-24": Case(OSS, total_gib=24, users=(1, 4, 16), targets_ms={1: 29, 16: 347}),
    "qwen3-fp8": Case(QWEN, "fp8", targets_ms={1: 3.29, 16: 8.06, 64: 11.1, 256: 12.3}),
    "qwen3-int4": Case(QWEN, "int4", targets_ms={1: 2.71, 16: 5.21, 64: 6.89, 256: 8.04}),
    "qwen3-fp8-40": Case(QWEN, "fp8", 40, users=(16, 256), targets_ms={256: 101}),
    "qwen3-fp8-24": Case(QWEN, "fp8", 24, users=(1, 4, 16)),
    "qwen3-int4-24": Case(QWEN, "int4", 24, users=(1, 4, 16)),
    "qwen3-fp8-16": Case(QWEN, "fp8", 16, users=(1, 4, 16), targets_ms={16: 214}),
    "qwen3-int4-16": Case(QWEN, "int4", 16, users=(1, 4, 16), targets_ms={16: 27}),
}


class SpokenTimes(StartTimes):
    """Prints each phase of a start when it ends, as kernels may be compiled for minutes."""

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """See `StartTimes`."""
        with super().phase(name) as phase:
            yield phase
        print(f"{name}: {phase.seconds:.1f} s", flush=True)


class Planned:
    """What the planner says of an engine's steps."""

    def __init__(self, loaded: LoadedModel, layout: ModelLayout, engine: Engine) -> None:
        model = loaded.model
        slots = slot_bytes_of(model, HostedExperts())
        assert slots is not None
        hardware = likely_hardware(model.device)
        cost = make_cost_model(model, layout, slots, loaded.name, hardware)
        self._cost = ExpertCost(cost, link_of(cost, cold_bytes=slots.cold_bytes))
        self._num_slots = slots.num_experts if engine.experts is None else engine.experts.num_slots

    def decode_ms(self, users: float, context: float) -> float:
        """A step of decodes."""
        return 1e3 * self._cost.decode_step(self._num_slots, users, context).seconds

    def prompt_ms(self, tokens: int) -> float:
        """A prompt of one step."""
        return 1e3 * self._cost.prompt_step(self._num_slots, tokens, Load(1, tokens, 1)).seconds


def decode_rows(
    engine: Engine, case: Case, planned: Planned, vocab_size: int
) -> list[dict[str, Any]]:
    """Steps of decodes alone, by the number of users."""
    spec = Spec(
        users=max(case.users), first_tokens=FIRST_TOKENS, output_tokens=STEPS + MARGIN, seed=SEED
    )
    work = make_work(spec, vocab_size)
    rows = []
    for users in case.users:
        before = None if engine.experts is None else engine.experts.counts()
        steady = SteadyRun(engine, work, lambda text: None).measure(users, STEPS)
        row = {
            "users": users,
            "context": round(steady.context),
            "step ms p50": round(steady.step_s["p50"] * 1e3, 3),
            "p90": round(steady.step_s["p90"] * 1e3, 3),
            "mean": round(steady.wall_s / steady.steps * 1e3, 3),
            "target ms": case.targets_ms.get(users),
            "predicted ms": round(planned.decode_ms(users, steady.context), 3),
            "output tokens/s": round(steady.output_tokens_per_s, 1),
            "ran": steady.users,
        }
        if before is not None:
            assert engine.experts is not None
            after = engine.experts.counts()
            hits = after.expert_hits - before.expert_hits
            needed = hits + after.expert_misses - before.expert_misses
            row["hit rate"] = round(hits / needed, 4) if needed else None
            row["moved GB"] = round((after.expert_bytes - before.expert_bytes) / 1e9, 2)
        print(row, flush=True)
        rows.append(row)
    return rows


def prompt_row(engine: Engine, case: Case, planned: Planned, vocab_size: int) -> dict[str, Any]:
    """The first token of prompts that run alone, each of other tokens."""
    rng = random.Random(SEED)
    times_ms = []
    for _ in range(NUM_PROMPTS):
        tokens = [rng.randrange(100, vocab_size) for _ in range(PROMPT_TOKENS)]
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        engine.add_request(tokens, SamplingParams(max_tokens=1, ignore_eos=True))
        while not any(output.finish_reason is not None for output in engine.step()):
            pass
        times_ms.append((time.perf_counter() - start_s) * 1e3)
        settle(engine, 30.0)
    return {
        "prompt tokens": PROMPT_TOKENS,
        "ms": round(statistics.median(times_ms[1:]), 2),
        "all ms": [round(each, 2) for each in times_ms],
        "target ms": case.prompt_target_ms,
        "predicted ms": round(planned.prompt_ms(PROMPT_TOKENS), 2),
    }


def run(case: Case, *, eviction: str, router_skew: float | None) -> dict[str, Any]:
    """All rows of a case."""
    start_s = time.perf_counter()
    loaded = load_dummy(
        narrow_models.config_file(case.model, case.quantisation),
        device="cuda",
        dtype="auto",
        seed=SEED,
        router_skew=router_skew,
        experts_on_host=case.total_gib is not None,
    )
    made_s = time.perf_counter() - start_s
    print(f"weights: {made_s:.1f} s", flush=True)
    # No others are recorded, which would take most of the time.
    tuning = replace(TUNINGS["cuda"], decode_sizes=case.users, mixed_sizes=(MIXED_TOKENS,))
    TUNINGS["cuda"] = tuning
    layout = inspect_model(loaded.model)  # it runs the model, which is not compiled yet
    engine = build_engine(case.options(eviction), loaded, times=SpokenTimes())
    ready_s = time.perf_counter() - start_s
    print(f"ready after {ready_s:.1f} s\n{engine.report}", flush=True)
    try:
        planned = Planned(loaded, layout, engine)
        vocab_size = loaded.model.config.get_text_config().vocab_size
        prompt = prompt_row(engine, case, planned, vocab_size)
        print(prompt, flush=True)
        return {
            "model": case.model,
            "quantisation": case.quantisation,
            "total_gib": case.total_gib,
            "eviction": eviction,
            "router_skew": router_skew,
            "made_s": round(made_s, 1),
            "ready_s": round(ready_s, 1),
            "report": engine.report,
            "peak_device_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
            "prompt": prompt,
            "decode": decode_rows(engine, case, planned, vocab_size),
        }
    finally:
        engine.close()
        release(torch.device("cuda"))


def users_of(text: str) -> Sequence[int]:
    """`1,16` as numbers."""
    return tuple(map(int, text.split(",")))


def main() -> None:
    """Measure one case, print and write."""
    parser = record.arguments(__doc__)
    parser.add_argument("--case", required=True, choices=list(CASES))
    parser.add_argument("--users", type=users_of, help="numbers of users in place of the case's")
    parser.add_argument("--total-gib", type=float, help="in place of the case's")
    parser.add_argument("--eviction", default="lru")
    parser.add_argument("--router-skew", type=float)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("an NVIDIA GPU is needed; this machine has none")
    case = CASES[args.case]
    if args.users is not None:
        case = replace(case, users=tuple(args.users))
    if args.total_gib is not None:
        case = replace(case, total_gib=args.total_gib)
    found = run(case, eviction=args.eviction, router_skew=args.router_skew)
    skewed = "" if args.router_skew is None else f", skew {args.router_skew}"
    policy = "" if case.total_gib is None else f", {args.eviction}"
    record.add(args.out, f"{args.case}{policy}{skewed}", record.start(seed=SEED, **found))


if __name__ == "__main__":
    main()
