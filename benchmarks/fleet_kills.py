"""Processes of a fleet are killed and stopped under streams of every kind; each answer is checked.

    python benchmarks/fleet_kills.py --out benchmarks/results/fleet_kills

Clients stream the same requests again and again over the port of `hotset fleet`: three tiny
replicas, two fronts, a desk and a store, which it starts again where they end. At random moments
one of its processes gets SIGKILL, or a replica gets SIGSTOP: for 3 s, after which it goes on, or
for 30 s, within which its requests move and after which what it says is too late. Every other event
is a replica that is killed. Each answer must be the tokens and the text of an undisturbed run, or
begin as that does and end with an error that says why. At the end no block is held. It needs Ray
and a server of the Redis protocol.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import record
from fleet_processes import prompts, status_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from running_fleet import RunningFleet

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 60}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 11},
    # No `top_p`: of this model's nearly equal probabilities rounding would choose another nucleus.
    "n = 3": {"temperature": 1.0, "seed": 5, "n": 3, "top_k": 20},
    "penalties, logprobs": {"frequency_penalty": 0.7, "repetition_penalty": 1.1, "logprobs": 2},
    "stop strings": {"temperature": 1.0, "seed": 3, "stop": ["qqq", "the end"], "min_tokens": 30},
    "schema": {"response_format": FORM, "ignore_eos": False, "temperature": 1.0, "seed": 8},
}
REPLICAS = 3
# What is killed -> words of its command line, and how many there are.
PROCESSES = {
    "a replica": ("-m hotset replica", REPLICAS),
    "a front": ("-m hotset front", 2),
    "the store": ("redis-server", 1),
    "the desk": ("-m hotset desk", 1),
    "Serve's controller": ("ray::ServeController", 1),
    "Ray's head": ("gcs/gcs_server", 1),
}
STOPPED_S = {"a replica, stopped for 3 s": 3.0, "a replica, stopped for 30 s": 30.0}
OTHERS = [name for name in (*PROCESSES, *STOPPED_S) if name != "a replica"]
VERDICTS = ("same", "error", "cut", "WRONG")
READY_TIMEOUT_S = 200.0


@dataclass(slots=True)
class Answer:
    """What came of one stream: tokens, text and finish reason by index of its outputs."""

    token_ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    text: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    finish: dict[int, str] = field(default_factory=dict)
    error: str | None = None
    is_refused: bool = False  # by its front, before it began
    is_cut: bool = False  # the connection ended early
    is_over: bool = False  # the last event came

    def begins(self, whole: "Answer") -> bool:
        """Whether nothing came twice, is missing, or differs up to where it ended."""
        return all(
            whole.token_ids[i][: len(ids)] == ids for i, ids in self.token_ids.items()
        ) and all(whole.text[i].startswith(text) for i, text in self.text.items())

    def verdict(self, whole: "Answer") -> str:
        """How the stream ended: `same`, `error`, `cut`, or `WRONG`."""
        if not self.begins(whole):
            return "WRONG"
        if self.error is not None:
            return "error"
        if not self.is_over:
            return "cut" if self.is_cut else "WRONG"
        same = (self.token_ids, self.text, self.finish) == (
            whole.token_ids,
            whole.text,
            whole.finish,
        )
        return "same" if same else "WRONG"


async def ask(port: int, prompt: str, kind: str, tokens: int) -> Answer:
    """One streamed text completion."""
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    body |= {"return_token_ids": True, "temperature": 0, **KINDS[kind]}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    answer = Answer()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
        writer.write(head.encode() + content)
        status = (await reader.readline()).decode()
        if " 200 " not in status:
            answer.error = f"{status.strip()} {(await reader.read())[-300:]!r}"
            answer.is_refused = True
            return answer
        while line := await reader.readline():
            if line.startswith(b"data: "):
                take(answer, line[6:].strip())
        writer.close()
    except OSError:
        pass
    answer.is_cut = not answer.is_over
    return answer


def take(answer: Answer, data: bytes) -> None:
    """One event of the stream."""
    if data == b"[DONE]":
        answer.is_over = True
        return
    chunk = json.loads(data)
    if "error" in chunk:
        answer.error = f"{chunk['error']['code']}: {chunk['error']['message']}"
        return
    for choice in chunk["choices"]:
        answer.token_ids[choice["index"]] += choice.get("token_ids") or []
        answer.text[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            answer.finish[choice["index"]] = choice["finish_reason"]


class Clients:
    """Users that ask the same again and again, and what came of it."""

    def __init__(self, port: int, args: argparse.Namespace) -> None:
        self._port, self._tokens = port, args.tokens
        texts, kinds = prompts(args.users, 10), list(KINDS)
        self._asked = [(text, kinds[i % len(kinds)]) for i, text in enumerate(texts)]
        self._wholes: list[Answer] = []
        self._is_over = False
        self.verdicts: Counter[tuple[str, str]] = Counter()  # by kind
        self.errors: Counter[str] = Counter()
        self.num_open = self.num_refused = 0

    async def learn(self) -> None:
        """The answers of an undisturbed run."""
        self._wholes = await asyncio.gather(
            *(ask(self._port, text, kind, self._tokens) for text, kind in self._asked)
        )
        for whole in self._wholes:
            if not whole.is_over or whole.error:
                raise SystemExit(f"an undisturbed stream failed: {whole.error}")

    async def run(self) -> None:
        """All users until `stop`."""
        await asyncio.gather(*(self._run(i) for i in range(len(self._asked))))

    def stop(self) -> None:
        """Ask no more; what runs goes on."""
        self._is_over = True

    async def _run(self, i: int) -> None:
        text, kind = self._asked[i]
        while not self._is_over:
            self.num_open += 1
            answer = await ask(self._port, text, kind, self._tokens)
            self.num_open -= 1
            if answer.is_refused or (answer.is_cut and not answer.token_ids):
                self.num_refused += 1  # its front is not there, or has no replica yet
                await asyncio.sleep(0.5)
                continue
            verdict = answer.verdict(self._wholes[i])
            self.verdicts[kind, verdict] += 1
            if verdict == "WRONG":
                record.say(f"WRONG {kind} {i}: {answer} where it was {self._wholes[i]}")
            if answer.error is not None:
                self.errors[answer.error] += 1
                await asyncio.sleep(0.5)


async def be_whole(fleet: RunningFleet, port: int) -> None:
    """Until all processes are there, and fronts have a link to each replica."""
    until_s, num_well = time.monotonic() + READY_TIMEOUT_S, 0
    while num_well < 6:  # each is told by any of the fronts
        found: object = {name: len(fleet.of(words)) for name, (words, _) in PROCESSES.items()}
        if found == {name: count for name, (_, count) in PROCESSES.items()}:
            with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
                found = [one["state"] for one in (await status_of(port))["fleet"]["replicas"]]
        is_well = isinstance(found, list) and found.count("serving") == REPLICAS
        num_well = num_well + 1 if is_well else 0
        if time.monotonic() > until_s:
            raise SystemExit(f"the fleet is not whole again: {found}\n{fleet.text()[-2000:]}")
        await asyncio.sleep(0.2)


async def disturb(fleet: RunningFleet, event: str, rng: random.Random) -> None:
    """Let one thing happen."""
    if event in STOPPED_S:
        one = rng.choice(fleet.replicas())
        one.suspend()
        await asyncio.sleep(STOPPED_S[event])
        with contextlib.suppress(psutil.NoSuchProcess):  # Serve has replaced it
            one.resume()
        return
    words, _ = PROCESSES[event]
    rng.choice(fleet.of(words)).kill()


async def campaign(fleet: RunningFleet, args: argparse.Namespace) -> dict[str, Any]:
    """All events, one after the other, under load."""
    rng, port = random.Random(args.seed), urlsplit(fleet.url).port
    assert port is not None
    await be_whole(fleet, port)
    clients = Clients(port, args)
    await clients.learn()
    running = asyncio.create_task(clients.run())
    others, events = itertools.cycle(OTHERS), list[dict[str, Any]]()
    for number in range(args.events):
        await asyncio.sleep(rng.uniform(0.5, 4.0))
        event, num_open = next(others) if number % 2 else "a replica", clients.num_open
        start_s = time.monotonic()
        await disturb(fleet, event, rng)
        await be_whole(fleet, port)
        whole_s = round(time.monotonic() - start_s, 1)
        events.append({"event": event, "open streams": num_open, "whole_s": whole_s})
        record.say(f"{events[-1]} {dict(clients.verdicts)}")
    clients.stop()
    await running
    told = (await status_of(port))["fleet"]
    return {
        "events": events,
        "verdicts": {
            kind: {verdict: clients.verdicts[kind, verdict] for verdict in VERDICTS}
            for kind in KINDS
        },
        "refused": clients.num_refused,
        "errors": dict(clients.errors),
        "fleet": {name: told[name] for name in ("resumed", "retried", "given_up", "pause_s")},
        "held_blocks": await held_blocks(port),
    }


async def held_blocks(port: int) -> int:
    """Blocks of device memory that requests hold, when none is left: a leak."""
    for _ in range(50):  # a replica hears of the last aborts within seconds
        device = (await status_of(port))["engine"]["tiers"][0]
        held = sum(device["cells"].count(state) for state in "hs")
        if not held:
            return 0
        await asyncio.sleep(0.2)
    return held


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [{"requests": kind, **counts} for kind, counts in result["verdicts"].items()]
    happened: dict[str, list[float]] = defaultdict(list)
    for one in result["events"]:
        happened[one["event"]].append(one["whole_s"])
    events = [
        {
            "killed": name,
            "times": len(each),
            "whole again after s, p50": sorted(each)[len(each) // 2],
        }
        for name, each in happened.items()
    ]
    counts = result["fleet"]
    pauses = ", ".join(
        f"{name} {value:.2f} s" for name, value in counts["pause_s"].items() if value is not None
    )
    errors = "".join(f"- {count} x `{error}`\n" for error, count in result["errors"].items())
    return (
        "# Kills and stops under streams\n\n"
        f"{result['users']} clients stream {result['tokens']} tokens each, again and again, over "
        f"`hotset fleet` with {REPLICAS} replicas, 2 fronts, a desk and a store. A stream is "
        "*same* where it has the tokens and the text of an undisturbed run, *error* where it "
        "begins as that and ends with an error event, *cut* where its front was killed. "
        f"{result['refused']} requests were refused, as no front was there.\n\n"
        f"{record.table(events)}\n\n{record.table(rows)}\n\n"
        f"{sum(counts['resumed'].values())} outputs went on in the middle of their answer, "
        f"{sum(counts['retried'].values())} requests were submitted again before it, as the fronts "
        f"that were there at the end had counted. Pauses of the first, as one of them saw them: "
        f"{pauses or 'none'}.\n\n"
        f"Errors that clients were told:\n\n{errors or '- none'}\n\n"
        f"Blocks held at the end: {result['held_blocks']}.\n\n{record.footer(result)}"
    )


def main() -> None:
    parser = record.arguments(__doc__ or "", out="results, without suffix")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--events", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: exit(1))
    with tempfile.TemporaryDirectory() as name:
        flags = ("--host-gib", "0.02", "--shared-gib", "0.1", "--route", "round-robin")
        flags += ("--log-level", "warning")
        fleet = RunningFleet(Path(name), *flags, num_replicas=REPLICAS)
        with contextlib.closing(fleet):
            fleet.wait_ready()
            found = asyncio.run(campaign(fleet, args))
    result = record.start(users=args.users, tokens=args.tokens, seed=args.seed, **found)
    record.write(args.out, result, page(result))
    print(page(result))
    wrong = sum(counts["WRONG"] for counts in result["verdicts"].values())
    if wrong or result["held_blocks"]:
        raise SystemExit(f"{wrong} wrong streams, {result['held_blocks']} blocks held")


if __name__ == "__main__":
    main()
