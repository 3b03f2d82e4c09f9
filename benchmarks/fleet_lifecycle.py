"""`hotset fleet` while its processes are killed: what streams of clients see, and what is left.

A fleet of tiny replicas answers streams, one after the other, to prompts whose answers are known.
Meanwhile each of its kinds of process is killed, all replicas start again one by one (SIGHUP), and
at last the first process is told to stop, and another fleet's is killed.

    python benchmarks/fleet_lifecycle.py --streams 16 --out benchmarks/results/fleet_lifecycle.json
"""

import contextlib
import json
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from running_fleet import RunningFleet, wait_long

PROMPTS = ["the cat", "the dog sat by the door", "once upon a time", "numbers are 1, 2, 3"]
QUIET_S = 5.0


def ask(url: str, prompt: str, tokens: int) -> Iterator[str]:
    """The texts of a stream as they come; raises RuntimeError where it does not end well."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code}")
        finish = None
        for line in answer.iter_lines():
            if line in ("", "data: [DONE]") or line.startswith(":"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["code"] or event["error"]["type"])
            choice = event["choices"][0]
            finish = choice["finish_reason"] or finish
            yield choice["delta"].get("content") or ""
        if finish != "length":
            raise RuntimeError(f"finish reason {finish}")


class Streams:
    """Threads that ask one stream after the other, and compare."""

    def __init__(self, url: str, count: int, tokens: int) -> None:
        self._url, self._tokens = url, tokens
        self._expected = {one: "".join(ask(url, one, tokens)) for one in PROMPTS}
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._outcomes: Counter[str] = Counter()
        self._pauses: list[float] = []
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]
        for one in self._threads:
            one.start()

    def _run(self, index: int) -> None:
        while not self._is_over.is_set():
            prompt = PROMPTS[index % len(PROMPTS)]
            index += 1
            last_s, longest_s, text = time.monotonic(), 0.0, ""
            try:
                for part in ask(self._url, prompt, self._tokens):
                    now_s = time.monotonic()
                    longest_s, last_s, text = max(longest_s, now_s - last_s), now_s, text + part
                outcome = "well" if text == self._expected[prompt] else "WRONG TEXT"
            except RuntimeError as error:
                outcome = str(error)
            except httpx.TransportError as error:
                outcome = f"connection: {type(error).__name__}"
                time.sleep(0.1)
            with self._lock:
                self._outcomes[outcome] += 1
                self._pauses.append(longest_s)

    def take(self) -> dict[str, Any]:
        """What came since the last call."""
        with self._lock:
            outcomes, self._outcomes = self._outcomes, Counter()
            pauses, self._pauses = self._pauses, []
        return {"streams": sum(outcomes.values()), "outcomes": dict(outcomes), "longest_s": pauses}

    def close(self) -> None:
        """Let the streams end."""
        self._is_over.set()
        for one in self._threads:
            one.join()


def kill_one_of(fleet: RunningFleet, *words: str) -> Callable[[], bool]:
    """Kill the first such process; tells when another is there in its place."""
    before = fleet.of(*words)
    before[0].kill()
    pids = {one.pid for one in before}

    def is_back() -> bool:
        now = fleet.of(*words)
        return len(now) >= len(before) and any(one.pid not in pids for one in now)

    return is_back


def kill_node(fleet: RunningFleet) -> Callable[[], bool]:
    """Kill Ray's node where the replicas run, and so all of them."""
    before = fleet.replicas()
    [node] = [one for one in before[0].parents() if "raylet" in one.name()]
    node.kill()
    pids = {one.pid for one in before}
    return lambda: (
        len(fleet.replicas()) == 2 and pids.isdisjoint(one.pid for one in fleet.replicas())
    )


def start_again(fleet: RunningFleet) -> Callable[[], bool]:
    """All replicas, one by one."""
    before = {one.pid for one in fleet.replicas()}
    fleet.process.send_signal(signal.SIGHUP)
    return lambda: (
        len(fleet.replicas()) == 2 and before.isdisjoint(one.pid for one in fleet.replicas())
    )


def events(fleet: RunningFleet) -> dict[str, Callable[[], Callable[[], bool]]]:
    return {
        "nothing": lambda: lambda: True,
        "kill -9 a replica": lambda: kill_one_of(fleet, "-m hotset replica"),
        "kill -9 a replica's actor": lambda: kill_one_of(fleet, "ray::ServeReplica"),
        "kill -9 the desk": lambda: kill_one_of(fleet, "-m hotset desk"),
        "kill -9 a front": lambda: kill_one_of(fleet, "-m hotset front"),
        "kill -9 Serve's controller": lambda: kill_one_of(fleet, "ray::ServeController"),
        "kill -9 Ray's head": lambda: kill_one_of(fleet, "gcs/gcs_server"),
        "start all replicas again (SIGHUP)": lambda: start_again(fleet),
        "kill -9 the node with all replicas": lambda: kill_node(fleet),
    }


def run_events(fleet: RunningFleet, count: int, tokens: int) -> list[dict[str, Any]]:
    streams, rows = Streams(fleet.url, count, tokens), []
    try:
        for name, event in events(fleet).items():
            streams.take()
            start_s = time.monotonic()
            is_back = event()
            wait_long(is_back)
            wait_long(lambda: len(fleet.replicas()) == 2)
            back_s = time.monotonic() - start_s
            time.sleep(QUIET_S)
            wait_long(lambda: _num_serving(fleet.url) == 2)
            taken = streams.take()
            pauses = record.percentiles(taken.pop("longest_s"), of=(50, 99, 100))
            rows.append({"event": name, "back_s": round(back_s, 1), **taken, "pause_s": pauses})
            record.say(f"{name}: {rows[-1]}")
    finally:
        streams.close()
    return rows


def _num_serving(url: str) -> int:
    with contextlib.suppress(httpx.HTTPError, KeyError):
        replicas = httpx.get(f"{url}/status.json", timeout=10).json()["fleet"]["replicas"]
        return sum(one["state"] == "serving" for one in replicas)
    return 0


def end_by(fleet: RunningFleet, number: signal.Signals) -> dict[str, Any]:
    """End the first process of a fleet; what of the others is left 10 s later."""
    all_of_it, start_s = fleet.all(), time.monotonic()
    fleet.process.send_signal(number)
    status = fleet.process.wait(120)
    end_s = time.monotonic() - start_s
    _, left = psutil.wait_procs(all_of_it, timeout=10)
    names = [" ".join(one.cmdline())[:80].strip() for one in left if one.is_running()]
    return {
        "signal": number.name,
        "processes": len(all_of_it),
        "status": status,
        "end_s": round(end_s, 1),
        "left": names,
    }


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    told = parser.parse_args()
    made = record.start(streams=told.streams, tokens=told.tokens)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(RunningFleet(Path(folder) / "a", "--shared-gib", "0.1")) as fleet:
            fleet.wait_ready()
            record.say("ready")
            made["ready_s"] = record.seconds()
            made["events"] = run_events(fleet, told.streams, told.tokens)
            made["ends"] = [end_by(fleet, signal.SIGTERM)]
        with contextlib.closing(RunningFleet(Path(folder) / "b")) as fleet:
            fleet.wait_ready()
            made["ends"].append(end_by(fleet, signal.SIGKILL))
    rows = [
        {
            "event": row["event"],
            "replaced after s": row["back_s"],
            "streams": row["streams"],
            "ended well": row["outcomes"].get("well", 0),
            "others": ", ".join(
                f"{n} {why}" for why, n in row["outcomes"].items() if why != "well"
            ),
            "longest pause p50 s": row["pause_s"]["p50"],
            "p99 s": row["pause_s"]["p99"],
        }
        for row in made["events"]
    ]
    tables = f"{record.table(rows)}\n\n{record.table(made['ends'])}"
    page = (
        f"# A fleet whose processes are killed\n\n{told.streams} streams of {told.tokens} tokens "
        "at once, 2 replicas, 2 fronts, a store. A pause is the longest time between two parts of "
        f"a stream.\n\n{tables}\n\n{record.footer(made)}"
    )
    record.write(told.out, made, page)
    print(page)


if __name__ == "__main__":
    main()
