"""The HTTP server: what it costs beside its engine, long prompts beside streams, and kill -9.

    python benchmarks/server.py --out benchmarks/results/server

- `overhead`: the same prompts by the engine alone, in a loop of steps, and over HTTP as that many
  streams at once, by turns. The clients are a process of their own, on the same machine.
- `burst`: gaps between the tokens of steady streams, before and while long prompts come in, for
  two sizes of a step.
- `recovery`: a server with a disk tier is killed with SIGKILL and started again: when it answers,
  and how soon the first token of a known conversation comes, against an unknown one.

Any of them alone: `--only overhead`. Writes `.json` and `.md`.
"""

import argparse
import asyncio
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import record

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Explain what a mutex is.",
    "How do vaccines work?",
    "What is photosynthesis?",
    "Who wrote Hamlet?",
    "What causes tides?",
    "What does a compiler do?",
)
FILLER = "The quick brown fox jumps over the lazy dog while the rain falls on the old stone wall. "
START_TIMEOUT_S = 300


@dataclass(slots=True)
class Server:
    """A `hotset serve` of this benchmark."""

    process: "subprocess.Popen[bytes]"
    url: str
    started_s: float  # from the start of the process until it answers

    def cpu_s(self) -> tuple[float, float]:
        """User and system time so far: of the HTTP process, and of the engine's."""
        process = psutil.Process(self.process.pid)
        http, *others = (one.cpu_times() for one in (process, *process.children(recursive=True)))
        return http.user + http.system, sum(one.user + one.system for one in others)


@contextmanager
def serving(args: argparse.Namespace, *flags: str) -> Iterator[Server]:
    """A server in a process of its own; killed at the end if it is still there."""
    command = [sys.executable, "-c", "from hotset.cli import main; main()", "serve"]
    command += ["--port", str(args.port), "--no-files", "--log-level", "warning", *flags]
    if args.model:
        command += ["--model", args.model]
    start_s = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{args.port}"
    try:
        while True:
            try:
                if httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or time.perf_counter() - start_s > START_TIMEOUT_S:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            time.sleep(0.05)
        yield Server(process, url, time.perf_counter() - start_s)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def messages(user: int) -> list[dict[str, str]]:
    """A short conversation, another one for each user."""
    question = QUESTIONS[user % len(QUESTIONS)]
    return [{"role": "user", "content": f"I am user {user}. {question}"}]


async def stream(http: httpx.AsyncClient, body: dict[str, Any]) -> list[float]:
    """When each chunk with text came."""
    times: list[float] = []
    body = {**body, "stream": True, "ignore_eos": True}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith('data: {"error"'):
                raise SystemExit(line)
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times


async def raw_stream(port: int, body: dict[str, Any]) -> list[float]:
    """`stream` with next to no work of its own, so that the clients take little of the machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps({**body, "stream": True, "ignore_eos": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: "
    writer.write(f"{head}{len(content)}\r\n\r\n".encode() + content)
    times: list[float] = []
    while True:
        data = await reader.read(65536)
        if b"data: [DONE]" in data:
            break
        if not data or b'data: {"error"' in data:
            raise SystemExit(f"a stream was dropped: {data!r}")
        if b"data: {" in data:
            times.append(time.perf_counter())
    writer.close()
    return times


async def all_streams(port: int, users: int, tokens: int) -> dict[str, float]:
    """All users at once; runs in the clients' process."""
    start_s = time.perf_counter()
    all_times = await asyncio.gather(
        *(
            raw_stream(port, {"messages": messages(i), "max_tokens": tokens, "temperature": 0})
            for i in range(users)
        )
    )
    return {
        "wall_s": time.perf_counter() - start_s,
        "chunks": sum(map(len, all_times)),
        "whole_streams": sum(bool(times) for times in all_times),
        "longest_gap_s": max(b - a for times in all_times for a, b in itertools.pairwise(times)),
        "clients_cpu_s": time.process_time(),
    }


def run_engine(args: argparse.Namespace) -> None:
    """The engine alone; a process of its own. Prints its seconds for each line it reads."""
    from hotset.engine.build import build_engine
    from hotset.engine.run import run_to_end
    from hotset.model.loader import load_model
    from hotset.options import Options
    from hotset.request import SamplingParams
    from hotset.text.prompt import PromptEncoder

    loaded = load_model(args.model, device="auto", dtype="auto")
    config = Options.of(
        hot_gib=args.hot_gib, max_num_seqs=args.users, prefix_caching=False, max_model_len=2048
    )
    engine = build_engine(config, loaded)
    encoder = PromptEncoder(loaded)
    prompts = [encoder.encode_chat(messages(i)) for i in range(args.users)]
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    print("ready", flush=True)
    for _ in sys.stdin:
        cpu_s, start_s = time.process_time(), time.perf_counter()
        for prompt in prompts:
            engine.add_request(prompt, params)
        for _ in run_to_end(engine):
            pass
        wall_s = time.perf_counter() - start_s
        print(json.dumps({"wall_s": wall_s, "cpu_s": time.process_time() - cpu_s}), flush=True)
    engine.close()


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """The engine alone and over HTTP, by turns; both stay loaded, the idle one costs nothing."""
    common = ["--users", str(args.users), "--tokens", str(args.tokens), "--port", str(args.port)]
    common += ["--hot-gib", str(args.hot_gib)] + (["--model", args.model] if args.model else [])
    script = [sys.executable, __file__, *common]
    flags = ["--hot-gib", str(args.hot_gib), "--max-num-seqs", str(args.users)]
    flags += ["--no-prefix-caching", "--max-model-len", "2048"]
    alone, http = [], []
    with (
        serving(args, *flags) as server,
        subprocess.Popen(
            [*script, "--as", "engine"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as engine,
    ):
        assert engine.stdin is not None and engine.stdout is not None
        engine.stdout.readline()
        for repeat in range(-1, args.repeats):  # the first warms both up
            engine.stdin.write("go\n")
            engine.stdin.flush()
            one = json.loads(engine.stdout.readline())
            cpu_s = server.cpu_s()
            client = subprocess.run(
                [*script, "--as", "clients"], capture_output=True, text=True, check=True
            )
            other = json.loads(client.stdout)
            for name, before, after in zip(
                ("http_cpu_s", "cpu_s"), cpu_s, server.cpu_s(), strict=True
            ):
                other[name] = after - before
            print(f"  turn {repeat}: alone {one}, over HTTP {other}", file=sys.stderr)
            if repeat >= 0:
                alone.append(one)
                http.append(other)
        engine.stdin.close()
    tokens = args.users * args.tokens

    def median(runs: list[dict[str, float]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    return {
        "users": args.users,
        "tokens_each": args.tokens,
        "alone": alone,
        "http": http,
        "alone_tokens_per_s": tokens / median(alone, "wall_s"),
        "http_tokens_per_s": tokens / median(http, "wall_s"),
        "wall_overhead": median(http, "wall_s") / median(alone, "wall_s") - 1,
        "cpu_overhead": (median(http, "cpu_s") + median(http, "http_cpu_s"))
        / median(alone, "cpu_s")
        - 1,
        "http_cpu_us_per_token": 1e6 * median(http, "http_cpu_s") / tokens,
        "clients_cpu_s": median(http, "clients_cpu_s"),
        "longest_gap_s": max(run["longest_gap_s"] for run in http),
        "whole_streams": min(run["whole_streams"] for run in http),
    }


async def measure_burst(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steady streams, and in their middle long prompts all at once."""
    async with httpx.AsyncClient(base_url=url, timeout=3600, trust_env=False) as http:
        steady = [
            asyncio.create_task(
                stream(http, {"messages": messages(i), "max_tokens": args.steady_tokens})
            )
            for i in range(args.steady)
        ]
        await asyncio.sleep(args.calm_s)
        burst_s = time.perf_counter()
        text = FILLER * (args.long_tokens // 20)
        bodies = [
            {"messages": [{"role": "user", "content": f"{i} {text}"}], "max_tokens": 2}
            for i in range(args.long)
        ]
        long_times = await asyncio.gather(*(stream(http, body) for body in bodies))
        end_s = max(times[0] for times in long_times)
        all_times = await asyncio.gather(*steady)
    calm, loaded = [], []
    for times in all_times:
        for a, b in itertools.pairwise(times):
            if b < burst_s:
                calm.append(b - a)
            elif a < end_s:
                loaded.append(b - a)
    return {
        "calm_itl_s": percentiles(calm),
        "burst_itl_s": percentiles(loaded),
        "burst_ttft_s": percentiles([times[0] - burst_s for times in long_times]),
    }


def burst(args: argparse.Namespace) -> dict[str, Any]:
    """What long prompts do to the streams beside them, by the tokens a step may have."""
    result: dict[str, Any] = {
        "steady": args.steady,
        "long": args.long,
        "long_tokens": args.long_tokens,
    }
    for step_tokens in args.step_tokens:
        flags = ["--hot-gib", str(args.hot_gib), "--max-mixed-tokens", str(step_tokens)]
        with serving(args, *flags) as server:
            result[str(step_tokens)] = asyncio.run(measure_burst(server.url, args))
            print(f"  {step_tokens}: {result[str(step_tokens)]}", file=sys.stderr)
    return result


def recovery(args: argparse.Namespace) -> dict[str, Any]:
    """Kill a server that has conversations on disk, start it again, and go on with them."""
    folder = Path(tempfile.mkdtemp(prefix="hotset-recovery-"))
    flags = ["--hot-gib", str(args.hot_gib), "--host-gib", "0.25", "--disk-gib", "2"]
    flags += ["--disk-path", str(folder), "--fetch-policy", "fetch"]
    context = FILLER * (args.long_tokens // 20)

    def ask(url: str, user: int) -> dict[str, float]:
        body = {
            "messages": [{"role": "user", "content": f"user {user}: {context}"}],
            "max_tokens": 1,
            "temperature": 0,
        }
        start_s = time.perf_counter()
        answer = httpx.post(
            f"{url}/v1/chat/completions", json=body, timeout=600, trust_env=False
        ).json()
        usage = answer["usage"]
        return {
            "ttft_s": time.perf_counter() - start_s,
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        }

    try:
        with serving(args, *flags) as server:
            before = [ask(server.url, user) for user in range(args.known)]
            time.sleep(2)  # what is queued for the disk gets there
            server.process.kill()
            server.process.wait()
        with serving(args, *flags) as server:
            known = [ask(server.url, user) for user in range(args.known)]
            unknown = [ask(server.url, 1000 + user) for user in range(args.known)]
            started_s = server.started_s
    finally:
        shutil.rmtree(folder)
    return {
        "conversations": args.known,
        "prompt_tokens": known[0]["prompt_tokens"],
        "restart_s": started_s,
        "found_share": sum(one["cached_tokens"] for one in known)
        / sum(one["prompt_tokens"] for one in known),
        "ttft_before_kill_s": statistics.median(one["ttft_s"] for one in before),
        "ttft_known_s": statistics.median(one["ttft_s"] for one in known),
        "ttft_unknown_s": statistics.median(one["ttft_s"] for one in unknown),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p99, the greatest, and of how many."""
    if not values:
        raise SystemExit("nothing was measured in a phase; give other --calm-s or --steady-tokens")
    return record.percentiles(values, of=(50, 99)) | {"max": max(values), "count": len(values)}


def report(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["# The server", ""]
    if one := results.get("overhead"):
        lines += [
            f"## HTTP beside the engine: {one['users']} streams of {one['tokens_each']} tokens",
            "",
            "| | tokens/s | wall, s | CPU of the engine's process, s |",
            "|---|---|---|---|",
        ]
        for name in ("alone", "http"):
            wall = statistics.median(run["wall_s"] for run in one[name])
            cpu = statistics.median(run["cpu_s"] for run in one[name])
            rate = one[f"{name}_tokens_per_s"]
            lines.append(f"| {name} | {rate:.0f} | {wall:.2f} | {cpu:.2f} |")
        lines += [
            "",
            f"Over HTTP it takes {100 * one['wall_overhead']:+.1f} % wall time, and the server's "
            f"two processes {100 * one['cpu_overhead']:+.1f} % CPU time. The HTTP process takes "
            f"{one['http_cpu_us_per_token']:.0f} µs of CPU time a token, set-up of the "
            f"requests included, and the clients {one['clients_cpu_s']:.1f} s in all, on the same "
            f"cores. {one['whole_streams']} of {one['users']} streams came to their end; the "
            f"longest gap in one was {one['longest_gap_s']:.2f} s.",
            "",
            record.footer(one["about"]),
        ]
    if one := results.get("burst"):
        lines += [
            f"## {one['steady']} streams while {one['long']} prompts of about "
            f"{one['long_tokens']} tokens come at once",
            "",
            "| tokens a step | ITL before: p50 / p99, s | ITL meanwhile: p50 / p99, s | "
            "long prompts' TTFT: p50 / p99, s |",
            "|---|---|---|---|",
        ]
        for key, row in one.items():
            if key.isdigit():
                cells = [
                    f"{row[name]['p50']:.3f} / {row[name]['p99']:.3f}"
                    for name in ("calm_itl_s", "burst_itl_s", "burst_ttft_s")
                ]
                lines.append(f"| {key} | {' | '.join(cells)} |")
        lines += ["", record.footer(one["about"])]
    if one := results.get("recovery"):
        lines += [
            "## After kill -9",
            "",
            f"Answers again {one['restart_s']:.1f} s after its start. Of "
            f"{one['conversations']} known conversations of {one['prompt_tokens']:.0f} tokens "
            f"{100 * one['found_share']:.0f} % of the prompt tokens are found; the first token "
            f"comes after {one['ttft_known_s']:.2f} s, of unknown ones after "
            f"{one['ttft_unknown_s']:.2f} s.",
            "",
            record.footer(one["about"]),
        ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=["overhead", "burst", "recovery"])
    parser.add_argument("--model", help="folder, .gguf or hub id; the default model without")
    parser.add_argument("--hot-gib", type=float, default=2.0)
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steady", type=int, default=16)
    parser.add_argument("--steady-tokens", type=int, default=400)
    parser.add_argument("--calm-s", type=float, default=15.0)
    parser.add_argument("--long", type=int, default=4)
    parser.add_argument("--long-tokens", type=int, default=1500)
    parser.add_argument("--step-tokens", type=int, nargs="+", default=[2048, 256])
    parser.add_argument("--known", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--as", dest="role", choices=["engine", "clients"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "engine":
        run_engine(args)
        return
    if args.role == "clients":
        print(json.dumps(asyncio.run(all_streams(args.port, args.users, args.tokens))))
        return
    results: dict[str, Any] = {}
    if args.out and args.out.with_suffix(".json").exists():  # the other sections stay
        results = json.loads(args.out.with_suffix(".json").read_text())
    for run in (overhead, burst, recovery):
        if args.only in (None, run.__name__):
            print(f"{run.__name__} ...", file=sys.stderr)
            about = record.start(model=args.model or "smollm2-135m-instruct")
            about["load_average"] = round(os.getloadavg()[0], 1)
            results[run.__name__] = {**run(args), "about": about}
    record.write(args.out, results, report(results))
    print(report(results))


if __name__ == "__main__":
    main()
