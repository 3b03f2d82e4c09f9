"""What a link costs beside the pipe to an engine's process: CPU per token, and time to a token.

    python benchmarks/fleet_link.py --out benchmarks/results/fleet_link

In place of an engine stands a source: each 20 ms it has one token for every open request, in one
report. It sits behind the same code as an engine does: `EngineProcess` (pipe), a `Listener` that a
`LinkHost` is connected to (link), or a `Listener` over an `EngineProcess`, as in `hotset replica`
(both). CPU time is that of all processes of an arm, less that of the source alone.
"""

import argparse
import multiprocessing
import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil
import record

from hotset.engine import process
from hotset.engine.messages import EngineInfo, Report, Submit
from hotset.fleet.address import Address
from hotset.fleet.link_host import LinkHost
from hotset.fleet.listener import Listener
from hotset.metrics import Metrics
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import FinishReason, RequestOutput, SamplingParams

STEP_S = 0.02
SECRET = b"0123456789abcdef0123456789abcdef"
OnReport = Callable[[Report], None]


class Source:
    """An engine's place: see `EngineHost`. A request of one token has it at once."""

    def __init__(self, options: Options, build: object, on_report: OnReport) -> None:
        self.model = LoadedModel(None, None, "source", "f" * 32, (2,), 2**17)
        self.info = EngineInfo(options, 2**17, "", False, "f", 16, 1)
        self.metrics = Metrics()
        self.is_alive = True
        self._on_report = on_report
        self._lock = threading.Lock()
        self._left: dict[str, int] = {}  # tokens by request
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, submit: Submit) -> None:
        """Take a request."""
        count = submit.params.max_tokens or 1
        if count == 1:
            self._on_report(Report(time.monotonic(), [self._output(submit.request_id, 1)]))
            return
        with self._lock:
            self._left[submit.request_id] = count

    def _run(self) -> None:
        due_s = time.monotonic()
        while True:
            due_s += STEP_S
            time.sleep(max(0.0, due_s - time.monotonic()))
            with self._lock:
                outputs = [self._output(one, left) for one, left in self._left.items()]
                self._left = {one: left - 1 for one, left in self._left.items() if left > 1}
            if outputs:
                self.metrics.output_tokens += len(outputs)
                self._on_report(Report(time.monotonic(), outputs))

    @staticmethod
    def _output(request_id: str, left: int) -> RequestOutput:
        reason = FinishReason.LENGTH if left == 1 else None
        token_id = 1000 + left % 30_000
        return RequestOutput(request_id, 0, " token", (token_id,), reason, prompt_tokens=900)

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        with self._lock:
            self._left.pop(request_id, None)

    def look(self, look_id: int) -> None:
        """Nothing."""

    def follow(self, is_on: bool) -> None:
        """Nothing."""

    def drain(self, drain_s: float) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


_engine_child = process._child


def source_child(connection: Connection, options: Options, build: object) -> None:
    """The child of an `EngineProcess`, with a source for the engine."""
    from hotset.engine import loop

    loop.EngineLoop = Source  # type: ignore[misc,assignment]
    _engine_child(connection, options, None)


def source_alone(ready: Connection, streams: int, tokens: int) -> None:
    """What the source itself takes."""
    source = Source(Options.of(), None, lambda report: None)
    ready.send(None)
    ready.recv()
    for i in range(streams):
        source.submit(Submit(f"chatcmpl-{i:024x}", [1], SamplingParams(max_tokens=tokens)))
    ready.recv()


def replica(ready: Connection, address: str, has_pipe: bool) -> None:
    """A replica's process."""
    listener = Listener(Address.of(address), SECRET, replica_id="r1")
    process._child = source_child
    kind = process.EngineProcess if has_pipe else Source
    host = kind(Options.of(), None, listener.take_report)
    listener.serve(host)
    ready.send(str(listener.address))
    ready.recv()
    listener.close()
    host.close()


class Arm:
    """A host with a source behind it, and all that has come from it."""

    def __init__(self, kind: str, folder: str) -> None:
        self.reports: queue.SimpleQueue[tuple[float, Report]] = queue.SimpleQueue()
        self._far, self._child = None, None
        if kind == "pipe":
            process._child = source_child
            self.host: Any = process.EngineProcess(Options.of(), None, self._take)
            return
        context = multiprocessing.get_context("spawn")
        self._far, theirs = context.Pipe()
        listen = "127.0.0.1:0" if "tcp" in kind else f"{folder}/{kind}.sock"
        args = (theirs, listen, kind.startswith("both"))
        self._child = context.Process(target=replica, args=args)
        self._child.start()
        self.host = LinkHost(self._far.recv(), SECRET, self._take)

    def _take(self, report: Report) -> None:
        self.reports.put((time.perf_counter(), report))

    def stream(self, streams: int, tokens: int) -> float:
        """All streams to their ends; CPU seconds of all processes meanwhile."""
        before = cpu_s()
        params = SamplingParams(max_tokens=tokens)
        for i in range(streams):
            self.host.submit(Submit(f"chatcmpl-{i:024x}", [1], params))
        left, seen = streams, 0
        while left:
            _, report = self.reports.get(timeout=60)
            seen += len(report.outputs)
            left -= sum(one.finish_reason is not None for one in report.outputs)
        assert seen == streams * tokens
        return cpu_s() - before

    def ttft_ms(self, prompt: list[int]) -> float:
        """From the submit to the one token."""
        start_s = time.perf_counter()
        self.host.submit(Submit("one", prompt, SamplingParams(max_tokens=1)))
        end_s, _ = self.reports.get(timeout=60)
        return 1e3 * (end_s - start_s)

    def close(self) -> None:
        """End its processes."""
        self.host.close()
        if self._far is not None and self._child is not None:
            self._far.send(None)
            self._child.join()


def cpu_s() -> float:
    """Of this process and all that it has started."""
    this = psutil.Process()
    times = [one.cpu_times() for one in (this, *this.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def source_us(streams: int, tokens: int) -> float:
    """CPU of a source that nobody listens to, per token."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=source_alone, args=(theirs, streams, tokens))
    child.start()
    ours.recv()
    before = cpu_s()
    ours.send(None)
    time.sleep(STEP_S * (tokens + 5))
    taken_s = cpu_s() - before
    ours.send(None)
    child.join()
    return 1e6 * taken_s / (streams * tokens)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All arms by turns, so that what else runs here meets each of them."""
    kinds = ["pipe", "link", "link tcp", "both"]
    cpu: dict[str, dict[int, list[float]]] = {kind: {n: [] for n in args.streams} for kind in kinds}
    base: dict[int, list[float]] = {n: [] for n in args.streams}
    times_ms: dict[str, dict[int, list[float]]] = {
        kind: {n: [] for n in args.prompts} for kind in kinds
    }
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.turns):
            for n in args.streams:
                base[n].append(source_us(n, args.tokens))
            for kind in kinds:
                arm = Arm(kind, folder)
                arm.stream(8, 20)  # warm
                for n in args.streams:
                    cpu[kind][n].append(1e6 * arm.stream(n, args.tokens) / (n * args.tokens))
                for length in args.prompts:
                    prompt = [1000 + i % 30_000 for i in range(length)]
                    times_ms[kind][length] += [arm.ttft_ms(prompt) for _ in range(args.pairs)][5:]
                arm.close()
                record.say(f"turn {turn} {kind}: {cpu[kind]}")
    return {
        "source_us": {n: statistics.median(values) for n, values in base.items()},
        "cpu_us_per_token": {
            kind: {
                n: {
                    "median": round(statistics.median(values) - statistics.median(base[n]), 2),
                    "turns": [round(one - statistics.median(base[n]), 2) for one in values],
                }
                for n, values in by.items()
            }
            for kind, by in cpu.items()
        },
        "ttft_ms": {
            kind: {n: record.percentiles(values, digits=3) for n, values in by.items()}
            for kind, by in times_ms.items()
        },
    }


def page(result: dict[str, Any]) -> str:
    """The figures as tables."""
    cpu, ttft = result["cpu_us_per_token"], result["ttft_ms"]
    rows = [
        {"": kind, **{f"{n} tokens a message, us": one["median"] for n, one in by.items()}}
        for kind, by in cpu.items()
    ]
    waits = [
        {
            "": kind,
            **{f"prompt of {n}: p50 / p99, ms": f"{one['p50']} / {one['p99']}"
               for n, one in by.items()},
        }
        for kind, by in ttft.items()
    ]  # fmt: skip
    return (
        "# A link between a front and a replica\n\n## CPU time per token of all processes\n\n"
        f"{record.table(rows)}\n\n## From a submit to a token that is there at once\n\n"
        f"{record.table(waits)}\n\n"
        "`pipe`: the engine's process alone. `link`, `link tcp`: a Unix socket and loopback, "
        "to the process that has the engine. `both`: `hotset replica`, whose engine has a process "
        "of its own. The source's own time is not in it.\n\n" + record.footer(result)
    )


def main() -> None:
    parser = record.arguments(__doc__ or "")
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 12_000])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=105)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    result = record.start(step_s=STEP_S, turns=args.turns, tokens=args.tokens)
    result |= measure(args)
    text = page(result)
    print(text)
    record.write(args.out, result, text)


if __name__ == "__main__":
    main()
