"""The processes of a fleet on one machine, and clients that note each token; for `fleet_*.py`."""

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import transformers

from hotset.fleet.directory import Directory
from hotset.model import default_model

START_TIMEOUT_S = 300
_STOP_TIMEOUT_S = 120
_RUN = [sys.executable, "-c", "from hotset.cli import main; main()"]


def small_model(folder: Path, *, layers: int = 2, hidden: int = 64) -> Path:
    """A Llama with random weights and the default model's tokenizer, saved in a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(default_model.ensure())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(slots=True)
class Processes:
    """Servers, replicas and fronts of one benchmark; all end with it.

    Attributes:
        folder: of logs, and of the fleet's directory.
        flags: of every engine.
    """

    folder: Path
    flags: Sequence[str] = ()
    running: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
        for process in self.running.values():
            process.wait(_STOP_TIMEOUT_S)

    @property
    def directory(self) -> Path:
        """Where replicas and fronts find each other."""
        return self.folder / "fleet"

    def start(self, name: str, *words: str, netns: str | None = None) -> None:
        """Start `hotset WORDS`; its lines go to a file."""
        inside = [] if netns is None else ["ip", "netns", "exec", netns]
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen([*inside, *_RUN, *words], stderr=log, stdout=log)

    def start_serve(self, name: str = "serve", *extra: str) -> int:
        """A server of its own; returns its port once it answers."""
        port = free_port()
        self.start(name, "serve", "--port", str(port), "--no-files", *self.flags, *extra)
        self._wait_for_health(name, port)
        return port

    def start_replica(self, replica_id: str, *extra: str, netns: str | None = None) -> None:
        """A replica; returns at once."""
        words = ["replica", "--directory", str(self.directory), "--id", replica_id]
        self.start(replica_id, *words, *self.flags, *extra, netns=netns)

    def wait_for_replicas(self, *replica_ids: str) -> None:
        """Until they are in the directory."""
        directory = Directory(self.directory)
        self._wait(
            lambda: {one.replica_id for one in directory.entries()} >= set(replica_ids),
            replica_ids[-1],
        )

    def start_front(self, name: str = "front", *extra: str) -> int:
        """A front; returns its port once it answers."""
        port = free_port()
        words = ["front", "--directory", str(self.directory), "--port", str(port), "--no-files"]
        self.start(name, *words, *extra)
        self._wait_for_health(name, port)
        return port

    def end(self, name: str) -> int:
        """SIGTERM, and wait; returns the exit status."""
        process = self.running.pop(name)
        process.terminate()
        return process.wait(_STOP_TIMEOUT_S)

    def cpu_s(self, name: str) -> tuple[float, float]:
        """User and system time so far: of the process itself, and of those it started."""
        process = psutil.Process(self.running[name].pid)
        own, *others = (one.cpu_times() for one in (process, *process.children(recursive=True)))
        return own.user + own.system, sum(one.user + one.system for one in others)

    def _wait_for_health(self, name: str, port: int) -> None:
        def answers() -> bool:
            try:
                url = f"http://127.0.0.1:{port}/health"
                return httpx.get(url, timeout=2, trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        self._wait(answers, name)

    def _wait(self, condition: Any, name: str) -> None:
        until_s = time.monotonic() + START_TIMEOUT_S
        while not condition():
            if self.running[name].poll() is not None or time.monotonic() > until_s:
                log = (self.folder / f"{name}.log").read_text(errors="replace")
                raise SystemExit(f"{name} did not start:\n{log[-2000:]}")
            time.sleep(0.05)


def free_port() -> int:
    """One that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@dataclass(slots=True)
class Answer:
    """What came of one stream.

    Attributes:
        token_ids: of the answer, in the order in which they came.
        times_s: when each chunk with tokens came, by `time.perf_counter`.
        sent_s: when the request was sent.
        finish: its finish reason; None where the stream ended without one.
        error: the message of an error event or of an answer that was none.
    """

    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """From sending to the first token."""
        return self.times_s[0] - self.sent_s

    @property
    def longest_gap_s(self) -> float:
        """Between two chunks."""
        return max((b - a for a, b in itertools.pairwise(self.times_s)), default=0.0)


async def stream(port: int, prompt: str | list[int], max_tokens: int, **fields: Any) -> Answer:
    """One streamed text completion, read with little work of the client's own."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    body |= {"return_token_ids": True, "temperature": 0, **fields}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    answer = Answer(time.perf_counter())
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
        writer.write(head.encode() + content)
        await _read(reader, answer)
        writer.close()
    except OSError as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def _read(reader: asyncio.StreamReader, answer: Answer) -> None:
    status = (await reader.readline()).decode().strip()
    if " 200 " not in status:
        answer.error = f"{status} {(await reader.read())[-300:]!r}"
        return
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        now_s, chunk = time.perf_counter(), json.loads(line[6:])
        if "error" in chunk:
            answer.error = str(chunk["error"]["message"])
            return
        for choice in chunk["choices"]:
            if token_ids := choice.get("token_ids"):
                answer.token_ids += token_ids
                answer.times_s.append(now_s)
            answer.finish = choice["finish_reason"] or answer.finish


async def status_of(port: int) -> dict[str, Any]:
    """The front's `/status.json`."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        found: dict[str, Any] = (await http.get(f"http://127.0.0.1:{port}/status.json")).json()
    return found


def prompts(count: int, words: int, seed: int = 0) -> list[str]:
    """Texts that begin in another way each, of so many short words."""
    numbers = range(seed * 100_000, seed * 100_000 + count)
    return [" ".join(f"{(i * 7919 + j * 104_729) % 9973}" for j in range(words)) for i in numbers]


def is_root_with_tun() -> bool:
    """Whether namespaces and TUN devices can be made here."""
    return os.geteuid() == 0 and os.access("/dev/net/tun", os.W_OK)
