"""What a long prompt costs those beside it: `hotset serve` on a CPU, over HTTP.

Five short requests and a stream, first alone, then beside one prompt of 3,000 tokens. What counts
are ratios between scenes of one server, as others may use the machine. A run takes three minutes.

    python benchmarks/fairness.py --label after --out benchmarks/results/fairness_cpu.json

Adds its figures to FILE under the label.
"""

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import httpx
import record

LONG_TOKENS = 3000
SHORT = "The quick brown fox jumps over the lazy dog while five small birds look {}"
NUM_SHORT = 5
IDLE_ROUNDS = 3


@dataclass
class Answer:
    """When the pieces of a streamed answer came, in seconds from when it was asked for."""

    sent_s: float
    pieces_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """From asking to the first piece."""
        return self.pieces_s[0]


class Client:
    """Streams answers of a server."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=900, trust_env=False)
        self.model = self._http.get("/v1/models").json()["data"][0]["id"]

    def ask(
        self, prompt: str | list[int], max_tokens: int, stop: threading.Event | None = None
    ) -> Answer:
        """Stream an answer to its end, or until `stop` is set."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "stream": True,
            "ignore_eos": True,
        }
        answer = Answer(time.perf_counter())
        with self._http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                    answer.pieces_s.append(time.perf_counter() - answer.sent_s)
                if stop is not None and stop.is_set():
                    break
        return answer


class Scene:
    """One server and those who ask it something at once."""

    def __init__(self, url: str) -> None:
        self._client = Client(url)
        self._rng = random.Random(0)
        self._pool = ThreadPoolExecutor(16)
        self._words = 0

    def short(self) -> Answer:
        """Ask for two tokens after 15 words."""
        self._words += 1  # each prompt is another, from its first words on
        return self._client.ask(f"{self._words} {SHORT.format(self._words)}", 2)

    def play(self, *, with_stream: bool, num_long: int) -> dict[str, Any]:
        """Shorts 0.3 s after the long prompts, beside a stream or not."""
        stop = threading.Event()
        stream = None
        if with_stream:
            stream = self._pool.submit(self._client.ask, "Once upon a time", 4000, stop)
            time.sleep(3.0)
        start_s = time.perf_counter()
        prompts = [
            [self._rng.randrange(1000, 20000) for _ in range(LONG_TOKENS)] for _ in range(num_long)
        ]
        longs = [self._pool.submit(self._client.ask, prompt, 2) for prompt in prompts]
        time.sleep(0.3)
        shorts = [one.result() for one in [self._pool.submit(self.short) for _ in range(NUM_SHORT)]]
        found: dict[str, Any] = {"short_ttft_s": [round(one.ttft_s, 3) for one in shorts]}
        for long in longs:
            found["long_ttft_s"] = round(long.result().ttft_s, 2)
        end_s = time.perf_counter()
        if stream is not None:
            if not longs:
                time.sleep(3.0)
            stop.set()
            answer = stream.result()
            times = [answer.sent_s + s for s in answer.pieces_s]
            inside = [s for s in times if start_s <= s <= (end_s if longs else times[-1])]
            gaps = [b - a for a, b in itertools.pairwise(inside)]
            found["stream_gap_s"] = {"p50": round(median(gaps), 3), "max": round(max(gaps), 3)}
        return found


def measure(url: str) -> dict[str, Any]:
    """All scenes, and the ratios between them."""
    scene = Scene(url)
    scene.play(with_stream=False, num_long=0)  # warms up
    found: dict[str, Any] = {}
    for with_stream in (False, True):
        idle = [scene.play(with_stream=with_stream, num_long=0) for _ in range(IDLE_ROUNDS)]
        beside = scene.play(with_stream=with_stream, num_long=1)
        idle_s = mean(s for one in idle for s in one["short_ttft_s"])
        beside_s = mean(beside["short_ttft_s"])
        one = {
            "idle": idle,
            "beside_a_long_prompt": beside,
            "short_ttft_ratio": round(beside_s / idle_s, 1),
        }
        if with_stream:
            idle_gap_s = median(one["stream_gap_s"]["p50"] for one in idle)
            one["stream_gap_ratio"] = round(beside["stream_gap_s"]["p50"] / idle_gap_s, 1)
        found["beside_a_stream" if with_stream else "no_stream"] = one
        print(json.dumps(one), flush=True)
    return found


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--label", required=True)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hotset", "serve", "--port", str(port), "--hot-gib", "1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            time.sleep(0.5)
            if server.poll() is not None:
                raise SystemExit("the server has ended")
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                continue
        found = measure(url)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    threads = os.environ.get("OMP_NUM_THREADS")
    made = record.start(seed=0, omp_num_threads=threads, **found)
    record.add(arguments.out, arguments.label, made)


if __name__ == "__main__":
    main()
