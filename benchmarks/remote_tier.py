"""The store that replicas share: what it costs an engine, what it saves, its rates, and waste.

    python benchmarks/remote_tier.py --out benchmarks/results/remote_tier

It needs `redis-server`.

- `engine`: conversations of two turns by engines without a store, with one, and with one that
  answers nothing (SIGSTOP), by turns: steps, seconds, and CPU seconds of all threads, which other
  work on the machine changes less. Each repeat has prompts of its own. `shared` is a first turn
  whose blocks another engine has left in the store, against the same turn computed.
- `rates`: payloads written and read, sealed or encrypted, by Unix socket and by TCP, with the CPU
  seconds that client and server take.
- `waste`: an hour of conversations that never come back, by a clock that is played.

Any of them alone: `--only engine`. Writes `.json` and `.md`.
"""

import argparse
import os
import random
import secrets
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import record

from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.run import run_to_end, settle
from hotset.fleet.store import LocalStore, start_store
from hotset.memory.remote.admission import Admission
from hotset.memory.remote.resp import Address
from hotset.memory.remote.seal import Seal
from hotset.memory.remote.tier import RemoteTier
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.units import GIB

SIZES = {"192 KiB": 192 * 2**10, "720 KiB": 720 * 2**10, "2 MiB": 2 * 2**20}
RATE_BYTES, RATE_REPEATS = 256 * 2**20, 3
IN_FLIGHT = 32
SETTLE_S = 60.0


class Played:
    """A clock that passes when it is told to."""

    now_s = 0.0

    def now(self) -> float:
        """See `Clock`."""
        return self.now_s


# What it costs and saves


class Engines:
    """Engines over one model, by name: without a store, with one, with one that hangs."""

    def __init__(self, args: argparse.Namespace, undo: ExitStack) -> None:
        self.loaded = load_model(args.model, device="cpu", dtype="float32")
        self.args, self.undo = args, undo
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        self.secret = folder / "secret"
        self.secret.write_text(secrets.token_hex(32))
        self.secret.chmod(0o600)
        self.url = self.start(folder / "with").url
        hung = self.start(folder / "hung")
        self.by_name = {
            "without": self.make(),
            "with": self.make(remote=self.url),
            "hung": self.make(remote=hung.url),
        }
        server = psutil.Process(hung.process.pid)
        server.suspend()
        undo.callback(server.resume)

    def start(self, folder: Path) -> LocalStore:
        """A store of its own."""
        folder.mkdir()
        store = start_store(folder, GIB)
        assert store is not None, "redis-server is not installed"
        self.undo.callback(store.close)
        return store

    def make(self, **given: Any) -> Engine:
        """An engine with these options beside those of all."""
        if given:
            given["remote_secret_file"] = self.secret
        options = Options.of(
            hot_gib=self.args.hot_gib,
            host_gib=self.args.host_gib,
            max_model_len=2048,
            threads=self.args.threads,
            fetch_policy="auto",
            **given,
        )
        engine = build_engine(options, self.loaded)
        self.undo.callback(engine.close)
        return engine


class Cost(NamedTuple):
    """What a turn took, CPU seconds being of all threads."""

    wall_s: float
    cpu_s: float
    steps: int


def timed(engine: Engine, prompts: list[list[int]], num_tokens: int) -> tuple[Any, Cost]:
    """Answers of all prompts at once, and what they took."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    answers: dict[str, list[int]] = {one: [] for one in ids}
    start_s, start_cpu_s, before = time.perf_counter(), time.process_time(), engine.metrics.steps
    for output in run_to_end(engine):
        answers[output.request_id] += output.token_ids
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    return list(answers.values()), Cost(wall_s, cpu_s, engine.metrics.steps - before)


def measure_engines(args: argparse.Namespace) -> list[dict[str, Any]]:
    draw = random.Random(args.seed)
    with ExitStack() as undo:
        engines = Engines(args, undo)
        costs: dict[tuple[str, str], list[Cost]] = {}

        def note(turn: str, name: str, cost: Cost) -> None:
            costs.setdefault((turn, name), []).append(cost)

        for repeat in range(args.repeats + 1):
            firsts = [prompt_of(draw, args.prompt_tokens) for _ in range(args.users)]
            more = [prompt_of(draw, args.prompt_tokens // 4) for _ in firsts]
            names = list(engines.by_name)
            draw.shuffle(names)
            expected: dict[str, Any] = {}
            for turn in ("first", "second"):
                for name in names:
                    prompts = firsts
                    if turn == "second":
                        answered = zip(firsts, expected["first"], more, strict=True)
                        prompts = [one + answer + rest for one, answer, rest in answered]
                    answers, cost = timed(engines.by_name[name], prompts, args.tokens)
                    assert expected.setdefault(turn, answers) == answers, "another answer"
                    settle(engines.by_name[name], SETTLE_S)
                    if repeat:  # the first one warms up
                        note(turn, name, cost)
            record.say(f"repeat {repeat}")
            if repeat:
                sharing(args, engines, firsts, expected["first"], note)
        left = {name: dict(one.metrics.faults) for name, one in engines.by_name.items()}
        moved = dict(engines.by_name["with"].metrics.moved_bytes)
        record.say(f"faults {left}, moved by the engine with a store {moved}")
    return [
        {
            "turn": turn,
            "engine": name,
            "repeats": len(each),
            "steps": round(statistics.mean(cost.steps for cost in each), 1),
            "wall_s": round(statistics.median(cost.wall_s for cost in each), 3),
            "cpu_s": round(statistics.median(cost.cpu_s for cost in each), 3),
            **ratios("wall_s", each, costs[turn, "without"]),
            **ratios("cpu_s", each, costs[turn, "without"]),
        }
        for (turn, name), each in costs.items()
    ]


def sharing(
    args: argparse.Namespace, engines: Engines, prompts: Any, expected: Any, note: Any
) -> None:
    """The first turn again, on replicas that never saw it: computed, or found in the store."""
    source = engines.by_name["with"]
    source.drain_tiers()
    settle(source, SETTLE_S)
    costs = {}
    for name, given in (("without", {}), ("with", {"remote": engines.url})):
        with ExitStack() as undo:
            engines.undo, outer = undo, engines.undo
            fresh = engines.make(**given)
            engines.undo = outer
            answers, costs[name] = timed(fresh, prompts, args.tokens)
            assert answers == expected, "another answer"
            if given and not fresh.metrics.cached_tokens["remote"]:
                record.say("the store answered too late: this repeat of `shared` is left out")
                return
    for name, cost in costs.items():
        note("shared", name, cost)


def ratios(what: str, costs: list[Cost], base: list[Cost]) -> dict[str, float]:
    """What each repeat took, divided by what the same repeat took without a store."""
    pairs = zip(costs, base, strict=True)
    each = [getattr(one, what) / getattr(other, what) for one, other in pairs]
    found = record.percentiles(each, of=(25, 50, 75), digits=3)
    return {f"{what} / without, {name}": value for name, value in found.items()}


def prompt_of(draw: random.Random, num_tokens: int) -> list[int]:
    return [draw.randrange(1000, 40_000) for _ in range(num_tokens)]


# Rates


@contextmanager
def tcp_server() -> Iterator[tuple[str, int]]:
    """A server's URL and process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    words += ["--maxmemory", "2gb", "--maxmemory-policy", "allkeys-lru"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}", server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


@contextmanager
def unix_server() -> Iterator[tuple[str, int]]:
    """Likewise."""
    with tempfile.TemporaryDirectory() as folder:
        store = start_store(Path(folder), 2 * GIB)
        assert store is not None, "redis-server is not installed"
        try:
            yield store.url, store.process.pid
        finally:
            store.close()


def measure_rates(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for way, server in (("Unix socket", unix_server), ("TCP", tcp_server)):
        for size, payload_bytes in SIZES.items():
            for encrypts in (False, True):
                with server() as (url, pid):
                    found = [rate(url, pid, payload_bytes, encrypts) for _ in range(RATE_REPEATS)]
                row = {"way": way, "payload": size, "sealed by": "GCM" if encrypts else "GMAC"}
                for name in found[0]:
                    row[name] = round(statistics.median(one[name] for one in found), 3)
                rows.append(row)
                record.say(str(row))
    return rows


def rate(url: str, pid: int, payload_bytes: int, encrypts: bool) -> dict[str, float]:
    seal = Seal(secrets.token_bytes(32), "", "benchmark", encrypts=encrypts)
    tier = RemoteTier([Address.of(url)], seal, payload_bytes=payload_bytes)
    num = RATE_BYTES // payload_bytes
    buffers = [memoryview(bytearray(os.urandom(payload_bytes))) for _ in range(num)]
    keys, found = [secrets.token_bytes(16) for _ in range(num)], dict[str, float]()
    server = psutil.Process(pid)
    for way in ("SET", "GET"):
        times = server.cpu_times()
        before, cpu_s, start_s = times.user + times.system, time.process_time(), time.perf_counter()
        num_ended, left = 0, list(zip(keys, buffers, strict=True))
        while num_ended < num:
            while left and num - len(left) - num_ended < IN_FLIGHT:
                key, buffer = left[-1]
                if way == "GET":
                    tier.submit_read(key, buffer)
                elif tier.submit_write(key, buffer, must=True) is None:
                    break
                left.pop()
            tier.wait(0.1)
            ended = tier.poll()
            assert all(one.fault is None for one in ended), ended
            num_ended += len(ended)
        seconds, num_bytes = time.perf_counter() - start_s, num * payload_bytes / 1e9
        times = server.cpu_times()
        found[f"{way} GB/s"] = num_bytes / seconds
        found[f"{way} client s/GB"] = (time.process_time() - cpu_s) / num_bytes
        found[f"{way} server s/GB"] = (times.user + times.system - before) / num_bytes
    tier.close()
    return found


# Waste


def measure_waste(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Three hours of conversations of 4,096 tokens of an 8B model, three per second."""
    clock, draw = Played(), random.Random(args.seed)
    payload_bytes, rate, blocks = 2 * 2**20, 1.2e9, 256
    admission, rows = Admission(payload_bytes, rate, clock), []
    total = offered = 0
    for second in range(3 * 3600):
        clock.now_s = float(second + 1)
        for _ in range(3):
            chain = [draw.randbytes(16) for _ in range(blocks)]
            taken = sum(map(admission.takes_new, chain))
            taken += len(admission.takes_used(chain, chain[::-1], came_back=False))
            total, offered = total + taken * payload_bytes, offered + blocks * payload_bytes
        if (second + 1) % 1800 == 0:
            rows.append(
                {
                    "minutes": (second + 1) // 60,
                    "offered GB": round(offered / 1e9),
                    "written GB": round(total / 1e9, 2),
                    "share": f"{100 * total / offered:.2f} %",
                }
            )
    return rows


def main() -> None:
    parser = record.arguments(__doc__, out="beginning of the results' names")
    parser.add_argument("--only", choices=["engine", "rates", "waste"])
    parser.add_argument("--model", help="folder or hub id; the default model where left out")
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=160)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hot-gib", type=float, default=0.25)
    parser.add_argument("--host-gib", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    measured = {"engine": measure_engines, "rates": measure_rates, "waste": measure_waste}
    result = record.start(seed=args.seed, repeats=args.repeats)
    page = "# The store that replicas share\n"
    for name, measure in measured.items():
        if args.only in (None, name):
            result[name] = measure(args)
            page += f"\n## {name}\n\n{record.table(result[name])}\n"
            print(record.table(result[name]), flush=True)
            record.write(args.out, result, page + "\n" + record.footer(result) + "\n")


if __name__ == "__main__":
    main()
