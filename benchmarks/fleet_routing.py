"""Routing by cost, by prefix, in turn and at random, over a trace; no GPU is needed.

Replicas are played: scheduler, KV cache, tiers, journal and loads are the engine's own,
and the route is a front's own. Steps compute nothing and take what `play_schedule.py` charges for
Llama-3.1-8B on an H200; copies to and from host memory take no time. KV blocks have 512 tokens, as
the trace's have, and lengths are those of the trace. What a replica tells arrives `LINK_S` later.

The capacity is that of round robin: requests per second where all are there at the start. All
routes get the same requests at the same times, `--loads` times as fast as that.

    python benchmarks/fleet_routing.py --trace TRACE --out benchmarks/results/fleet_routing

With `--capacity` that of an earlier run is taken, and its rows of other loads and routes are kept.
"""

import gc
import heapq
import itertools
import json
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import record
from play_schedule import TRIALS, step_s
from played import PlayedClock, make_engine
from transformers import LlamaConfig

from hotset.bench.trace import BLOCK_TOKENS, trace_work
from hotset.bench.workload import Session, Spec
from hotset.engine.following import Following
from hotset.engine.messages import EngineInfo, Report, Submit
from hotset.fleet.route import Choice, Random, RoundRobin, Route
from hotset.fleet.router import CostRoute, PrefixRoute
from hotset.memory.disk.slab import slot_bytes_for
from hotset.model.dummy import load_dummy
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.units import GIB

VOCAB_SIZE = 4000
MAX_TOKENS = 131072
BLOCK_BYTES = BLOCK_TOKENS * 2 * 2 * 4  # of the stand-in
DEVICE_BLOCKS = 1625  # 52,000 blocks of 16 tokens: what an H200 has beside the weights
HOST_BLOCKS = 16384  # 1 TiB of Llama-3.1-8B's KV
LINK_S = 0.002
AHEAD = 8  # requests that an engine gets before it has room, as its loop gives them

ROUTES: dict[str, Callable[[PlayedClock], Route]] = {
    "cost": lambda clock: CostRoute(clock, seed=0),
    "prefix": lambda clock: PrefixRoute(clock, seed=0),
    "round-robin": lambda clock: RoundRobin(),
    "random": lambda clock: Random(),
}


def make_model() -> LoadedModel:
    """Something to make engines of."""
    config = LlamaConfig(
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_TOKENS,
        architectures=["LlamaForCausalLM"],
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return load_dummy(folder, device="cpu", dtype="float32")


class Replica:
    """An engine on a clock of its own, with the queue before it and what it tells."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.engine, self._executor = make_engine(
            Options.of(
                device="cpu",
                dtype="float32",
                block_size=BLOCK_TOKENS,
                hot_gib=(DEVICE_BLOCKS + 0.5) * BLOCK_BYTES / GIB,
                host_gib=HOST_BLOCKS * slot_bytes_for(BLOCK_BYTES) / GIB,
                max_num_batched_tokens=8192,
                max_mixed_tokens=1024,
                max_model_len=MAX_TOKENS,
            ),
            loaded,
            step_s,
            vocab_size=VOCAB_SIZE,
            trials=TRIALS,
            row_tile=256,
        )
        engine = self.engine
        self.clock = self._executor.clock
        engine.rates.prefill_tokens_per_s = TRIALS[-1][0] / TRIALS[-1][1]
        self._following = Following(engine, self.clock)
        self._queue: deque[Submit] = deque()
        self._not_started: set[str] = set()
        self._num_open = 0
        self.info = EngineInfo(
            engine.options,
            engine.max_model_len,
            engine.report,
            False,
            engine.kv.prefixes.fingerprint,
            engine.kv.block_size,
            engine.sizes.block_bytes // engine.kv.block_size,
        )

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._queue) or self.engine.has_work

    @property
    def busy_s(self) -> float:
        """Seconds of all steps."""
        return sum(self._executor.seconds)

    def follow(self, is_on: bool) -> None:
        """See `EngineHost`."""
        self._following.follow(is_on)

    def submit(self, submit: Submit, now_s: float) -> None:
        """Queue a request."""
        if not self.has_work:
            self.clock.now_s = max(self.clock.now_s, now_s)
        self._queue.append(submit)
        self._following.arrive(submit)
        self._num_open += 1

    def step(self) -> Report:
        """One step; what it tells at its end."""
        engine = self.engine
        while self._queue and len(engine.scheduler.waiting) < AHEAD:
            one = self._queue.popleft()
            engine.add_request(list(one.token_ids), one.params, request_id=one.request_id)
            self._not_started.add(one.request_id)
        outputs = engine.step(num_queued=len(self._queue))
        for request in engine.scheduler.running:
            self._start(request.request_id)
        for output in outputs:
            if output.finish_reason is not None:
                self._start(output.request_id)
                self._num_open -= 1
        journal, load = self._following.news(self._num_open)
        return Report(self.clock.now_s, outputs, journal=journal, load=load)

    def _start(self, request_id: str) -> None:
        if request_id in self._not_started:
            self._not_started.remove(request_id)
            self._following.start(request_id)


class Player:
    """Requests of a trace through a route and its replicas, in the order of events."""

    def __init__(self, route: Route, clock: PlayedClock, replicas: dict[str, Replica]) -> None:
        self._route, self._clock, self._replicas = route, clock, replicas
        self._reports: list[tuple[float, int, str, Report]] = []  # a heap: on their way
        self._numbers = itertools.count()
        self._sent: dict[str, tuple[Choice, Submit, float]] = {}
        self.ttft_s: list[float] = []
        self.found_tokens = self.predicted_tokens = self.wrong_tokens = self.prompt_tokens = 0
        self.ratios: list[float] = []  # predicted over real time to the first token
        self.went: Counter[str] = Counter()
        self.route_s = 0.0

    @property
    def num_snapshots(self) -> int:
        """That the route asked for."""
        return self._route.num_snapshots

    def play(self, sessions: Iterable[Session], times_s: Iterable[float]) -> float:
        """Send each request at its time; returns when the last one has ended."""
        for name, replica in self._replicas.items():
            self._route.join(name, replica)  # type: ignore[arg-type]
        for number, (session, at_s) in enumerate(zip(sessions, times_s, strict=True)):
            self._run_until(at_s)
            [turn] = session.turns
            params = SamplingParams(max_tokens=turn.output_tokens, ignore_eos=True)
            self._send(Submit(f"r{number}", turn.make_tokens(), params), at_s)
        self._run_until(float("inf"))
        return max(replica.clock.now_s for replica in self._replicas.values())

    def _run_until(self, until_s: float) -> None:
        """Steps that begin before then, and reports that arrive before."""
        while True:
            busy = {name: one for name, one in self._replicas.items() if one.has_work}
            name = min(busy, key=lambda name: busy[name].clock.now_s, default="")
            step_s = busy[name].clock.now_s if busy else float("inf")
            report_s = self._reports[0][0] if self._reports else float("inf")
            if min(step_s, report_s) >= until_s:
                return
            if report_s <= step_s:
                self._clock.now_s, _, name, report = heapq.heappop(self._reports)
                self._take(name, report)
            else:
                report = busy[name].step()
                arrival = (busy[name].clock.now_s + LINK_S, next(self._numbers), name, report)
                heapq.heappush(self._reports, arrival)

    def _send(self, submit: Submit, at_s: float) -> None:
        self._clock.now_s = at_s
        start_s = time.perf_counter()
        choice = self._route.choose(submit, list(self._replicas))
        self.route_s += time.perf_counter() - start_s
        submit = replace(submit, expected_tokens=choice.expected_tokens)
        self._sent[submit.request_id] = (choice, submit, at_s)
        self._replicas[choice.replica_id].submit(submit, at_s + LINK_S)
        self.went[f"{choice.replica_id} {choice.why.value}"] += 1

    def _take(self, name: str, report: Report) -> None:
        self._route.take(name, report)
        for output in report.outputs:
            if output.token_ids and (sent := self._sent.pop(output.request_id, None)):
                choice, submit, at_s = sent
                ttft_s = self._clock.now_s - at_s
                self._route.found(choice, submit, output.cached_tokens, ttft_s)
                self._note(choice, submit, output.cached_tokens, ttft_s)

    def _note(self, choice: Choice, submit: Submit, cached_tokens: int, ttft_s: float) -> None:
        self.ttft_s.append(ttft_s)
        self.prompt_tokens += len(submit.token_ids)
        self.found_tokens += cached_tokens
        if choice.expected_tokens is not None:
            predicted = len(submit.token_ids) - choice.expected_tokens
            self.predicted_tokens += predicted
            self.wrong_tokens += abs(predicted - cached_tokens)
            self.ratios.append(choice.expected_ttft_s / ttft_s)


def play(
    name: str, sessions: list[Session], times_s: list[float], loaded: LoadedModel, num: int
) -> dict[str, Any]:
    """One route over fresh replicas."""
    clock = PlayedClock()
    replicas = {f"replica-{i}": Replica(loaded) for i in range(num)}
    player = Player(ROUTES[name](clock), clock, replicas)
    end_s = player.play(sessions, times_s)
    assert len(player.ttft_s) == len(sessions)
    figures = {
        "route": name,
        "requests_per_s": round(len(sessions) / end_s, 3),
        "found_share": round(player.found_tokens / player.prompt_tokens, 4),
        "busy_share": round(sum(one.busy_s for one in replicas.values()) / num / end_s, 3),
        "ttft_s": {
            "mean": round(float(np.mean(player.ttft_s)), 3),
            **record.percentiles(player.ttft_s, of=(50, 90, 99), digits=3),
        },
        "computed_tokens": sum(one.engine.metrics.prefilled_tokens for one in replicas.values()),
        "route_ms": round(1e3 * player.route_s / len(sessions), 2),
        "went": dict(sorted(player.went.items())),
    }
    if player.ratios:
        figures["wrong_share"] = round(player.wrong_tokens / player.prompt_tokens, 4)
        figures["predicted_over_real_ttft"] = record.percentiles(
            player.ratios, of=(10, 50, 90), digits=2
        )
        figures["snapshots"] = player.num_snapshots
    for one in replicas.values():
        one.engine.close()
    gc.collect()
    return figures


def attainable(sessions: list[Session]) -> float:
    """Share of the prompts' tokens that one cache without a bound would find."""
    tokens = sum(turn.num_tokens for one in sessions for turn in one.turns)
    return sum(turn.known_tokens for one in sessions for turn in one.turns) / tokens


_SAME = ("requests", "first", "replicas", "capacity_per_s")


def kept_rows(out: Path | None, found: dict[str, Any], again: set[tuple[float, str]]) -> list[Any]:
    """Rows of an earlier run of the same requests that are not made again."""
    if out is None or not out.with_suffix(".json").exists():
        return []
    old = json.loads(out.with_suffix(".json").read_text())
    if any(old[name] != found[name] for name in _SAME):
        return []
    return [run for run in old["runs"] if (run["load"], run["route"]) not in again]


def page(found: dict[str, Any]) -> str:
    """The results as text."""
    rows = [
        {
            "load": run["load"],
            "route": run["route"],
            "found of prompts": f"{run['found_share']:.1%}",
            "computed tokens": f"{run['computed_tokens']:,}",
            "TTFT p50, s": run["ttft_s"]["p50"],
            "p99": run["ttft_s"]["p99"],
            "mean": run["ttft_s"]["mean"],
            "busy": f"{run['busy_share']:.0%}",
            "predicted wrongly": "" if "wrong_share" not in run else f"{run['wrong_share']:.1%}",
        }
        for run in found["runs"]
    ]
    return (
        f"# Routes over {found['replicas']} replicas\n\n"
        f"{found['requests']:,} requests of Mooncake's conversation trace, from number "
        f"{found['first']:,} on, lengths as they are,\nblocks of 512 tokens, played on the "
        "engine's own scheduler with step times of Llama-3.1-8B on an\nH200; nothing is computed, "
        f"and copies to and from host memory take no time. {DEVICE_BLOCKS:,} blocks on\nthe device "
        f"and {HOST_BLOCKS:,} in host memory per replica. Round robin's capacity is "
        f"{found['capacity_per_s']} requests/s.\nOne cache without a bound would find "
        f"{found['attainable_share']:.1%} of the prompts' tokens.\n\n"
        f"{record.table(rows)}\n\n{record.footer(found)}"
    )


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--trace", type=Path, required=True, help="Mooncake's conversation trace.")
    parser.add_argument("--requests", type=int, default=4000, help="Of the trace.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first one.")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--loads", default="0.7,0.9", help="Parts of the capacity.")
    parser.add_argument("--routes", default=",".join(ROUTES))
    parser.add_argument("--capacity", type=float, help="Requests/s, where it is known.")
    arguments = parser.parse_args()
    spec = Spec("trace", trace=arguments.trace, seed=0)
    work = trace_work(spec, VOCAB_SIZE, max_context=MAX_TOKENS)
    sessions = list(work.sessions[arguments.first :][: arguments.requests])
    loaded, num = make_model(), arguments.replicas
    found = record.start(
        requests=len(sessions),
        first=arguments.first,
        replicas=num,
        seed=0,
        attainable_share=round(attainable(sessions), 4),
    )
    capacity = arguments.capacity
    if capacity is None:
        together = play("round-robin", sessions, [0.0] * len(sessions), loaded, num)
        capacity = together["requests_per_s"]
        record.say(f"capacity {together}")
    found["capacity_per_s"] = capacity
    trace_s = sessions[-1].arrival_s - sessions[0].arrival_s
    loads, routes = [*map(float, arguments.loads.split(","))], arguments.routes.split(",")
    found["runs"] = kept_rows(arguments.out, found, {*itertools.product(loads, routes)})
    for load in loads:
        scale = len(sessions) / (load * capacity) / trace_s
        times_s = [(one.arrival_s - sessions[0].arrival_s) * scale for one in sessions]
        for name in routes:
            figures = {"load": load, **play(name, sessions, times_s, loaded, num)}
            found["runs"].append({**figures, "commit": found["commit"]})
            found["runs"].sort(key=lambda run: (run["load"], [*ROUTES].index(run["route"])))
            record.say(str(figures))
            record.write(arguments.out, found, page(found))


if __name__ == "__main__":
    main()
