"""Replicas and fronts are killed and stopped under streams of every kind; each answer is checked.

    python benchmarks/fleet_kills.py --out benchmarks/results/fleet_kills

Clients stream the same requests again and again over two fronts and three replicas. At random
moments a replica or a front gets SIGKILL and is started again as a supervisor does, or a replica
gets SIGSTOP: for 3 s, after which it goes on, or for 30 s, within which its requests move and
after which what it says is too late. Each answer must be the tokens and the text of an undisturbed
run, or begin as that does and end with an error that says why. At the end no block is held.
"""

import argparse
import asyncio
import json
import random
import signal
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import record
from fleet_processes import Processes, prompts, small_model, status_of

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
REPLICAS = ("replica-0", "replica-1", "replica-2")
FRONTS = ("front-0", "front-1")
EVENTS = ("replica killed", "replica killed", "front killed", "stopped 3 s", "stopped 30 s")
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

    def __init__(self, ports: dict[str, int], args: argparse.Namespace) -> None:
        self._ports, self._tokens = ports, args.tokens
        texts, kinds = prompts(args.users, 20), list(KINDS)
        self._asked = [(text, kinds[i % len(kinds)]) for i, text in enumerate(texts)]
        self._wholes: list[Answer] = []
        self._is_over = False
        self.verdicts: Counter[tuple[str, str]] = Counter()  # by kind
        self.errors: Counter[str] = Counter()
        self.num_open = self.num_refused = 0

    async def learn(self) -> None:
        """The answers of an undisturbed run."""
        port = self._ports[FRONTS[0]]
        self._wholes = await asyncio.gather(
            *(ask(port, text, kind, self._tokens) for text, kind in self._asked)
        )
        for whole in self._wholes:
            if not whole.is_over or whole.error:
                raise SystemExit(f"an undisturbed stream failed: {whole.error}")

    async def run(self) -> None:
        """All users until `stop`, each at one of the fronts."""
        await asyncio.gather(*(self._run(i) for i in range(len(self._asked))))

    def stop(self) -> None:
        """Ask no more; what runs goes on."""
        self._is_over = True

    async def _run(self, i: int) -> None:
        text, kind = self._asked[i]
        while not self._is_over:
            self.num_open += 1
            answer = await ask(self._ports[FRONTS[i % 2]], text, kind, self._tokens)
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


async def all_serve(ports: dict[str, int]) -> None:
    """Until each front has a link to each replica."""
    until_s = time.monotonic() + READY_TIMEOUT_S
    for port in ports.values():
        while True:
            try:
                found = (await status_of(port))["fleet"]["replicas"]
                if sum(one["state"] == "serving" for one in found) == len(REPLICAS):
                    break
            except (httpx.HTTPError, KeyError, ValueError):
                found = "no answer"
            if time.monotonic() > until_s:
                raise SystemExit(f"not all replicas serve: {found}")
            await asyncio.sleep(0.2)


async def disturb(
    processes: Processes, ports: dict[str, int], event: str, rng: random.Random
) -> str:
    """Let one thing happen; returns to what. The fleet is whole again then."""
    name = rng.choice(FRONTS if event == "front killed" else REPLICAS)
    process = processes.running[name]
    if event.startswith("stopped"):
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(float(event.split()[1]))
        process.send_signal(signal.SIGCONT)
        return name
    process.kill()
    await asyncio.to_thread(process.wait)
    if name in REPLICAS:
        processes.start_replica(name)
    else:
        del processes.running[name]
        words = ["front", "--directory", str(processes.directory), "--port", str(ports[name])]
        processes.start(name, *words, "--no-files", "--route", "round-robin")
    return name


async def campaign(processes: Processes, args: argparse.Namespace) -> dict[str, Any]:
    """All events, one after the other, under load."""
    rng = random.Random(args.seed)
    for name in REPLICAS:
        processes.start_replica(name)
    await asyncio.to_thread(processes.wait_for_replicas, *REPLICAS)
    ports = {
        name: await asyncio.to_thread(processes.start_front, name, "--route", "round-robin")
        for name in FRONTS
    }
    await all_serve(ports)
    clients = Clients(ports, args)
    await clients.learn()
    running = asyncio.create_task(clients.run())
    events: list[dict[str, Any]] = []
    for number in range(args.events):
        await asyncio.sleep(rng.uniform(0.5, 4.0))
        event, num_open = EVENTS[number % len(EVENTS)], clients.num_open
        name = await disturb(processes, ports, event, rng)
        await all_serve(ports)
        events.append({"event": event, "of": name, "open streams": num_open})
        record.say(f"{events[-1]} {dict(clients.verdicts)}")
    clients.stop()
    await running
    statuses = [await status_of(port) for port in ports.values()]
    return {
        "events": events,
        "verdicts": {
            kind: {verdict: clients.verdicts[kind, verdict] for verdict in VERDICTS}
            for kind in KINDS
        },
        "refused": clients.num_refused,
        "errors": dict(clients.errors),
        "fleet": [
            {name: one["fleet"][name] for name in ("resumed", "retried", "given_up", "pause_s")}
            for one in statuses
        ],
        "held_blocks": await held_blocks(next(iter(ports.values()))),
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
    happened = Counter(one["event"] for one in result["events"])
    counts = result["fleet"][0]  # of all fronts that share the directory
    pauses = "; ".join(
        f"{name} p50 {one['pause_s']['p50']:.2f} s, p99 {one['pause_s']['p99']:.2f} s"
        for name, one in zip(FRONTS, result["fleet"], strict=True)
        if one["pause_s"]["p50"] is not None
    )
    errors = "".join(f"- {count} x `{error}`\n" for error, count in result["errors"].items())
    return (
        "# Kills and stops under streams\n\n"
        f"{result['users']} clients stream {result['tokens']} tokens each, again and again, over "
        f"two fronts and three replicas of one machine. Events: "
        f"{', '.join(f'{count} x {event}' for event, count in happened.items())}. A stream is "
        "*same* where it has the tokens and the text of an undisturbed run, *error* where it "
        "begins as that and ends with an error event, *cut* where its front was killed. "
        f"{result['refused']} requests were refused, as their front was not there.\n\n"
        f"{record.table(rows)}\n\n"
        f"{sum(counts['resumed'].values())} requests went on in the middle of their answer, "
        f"{sum(counts['retried'].values())} were submitted again before it. Pauses of the first, "
        f"as each front saw them since it started: {pauses or 'none'}.\n\n"
        f"Errors that clients were told:\n\n{errors or '- none'}\n\n"
        f"Blocks held at the end: {result['held_blocks']}.\n\n{record.footer(result)}"
    )


def main() -> None:
    parser = record.arguments(__doc__ or "", out="results, without suffix")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: exit(1))
    with tempfile.TemporaryDirectory() as name:
        model = small_model(Path(name) / "model")
        flags = ["--model", str(model), "--hot-gib", "0.1", "--max-model-len", "1024"]
        with Processes(Path(name), flags) as processes:
            found = asyncio.run(campaign(processes, args))
    result = record.start(users=args.users, tokens=args.tokens, seed=args.seed, **found)
    record.write(args.out, result, page(result))
    print(page(result))
    wrong = sum(counts["WRONG"] for counts in result["verdicts"].values())
    if wrong or result["held_blocks"]:
        raise SystemExit(f"{wrong} wrong streams, {result['held_blocks']} blocks held")


if __name__ == "__main__":
    main()
