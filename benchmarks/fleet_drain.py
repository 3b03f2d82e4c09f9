"""What a kill and a drain of a replica cost its users: pauses of streams, conversations kept.

    python benchmarks/fleet_drain.py --out benchmarks/results/fleet_drain

- `kill`: all users stream; one of two replicas gets SIGKILL in the middle and is started again,
  time after time. A pause is from the last token before to the first after it.
- `drain`: users have a turn each, then one of two replicas gets SIGTERM, and all have a second turn
  at the other. Found tokens of the conversations, with a shared store (`redis-server`, if there is
  one) and without.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import record
from fleet_processes import Answer, Processes, prompts, small_model, status_of, stream

SERVING_TIMEOUT_S = 120.0
REPLICAS = ("replica-0", "replica-1")


async def wait_for_serving(port: int, count: int) -> dict[str, Any]:
    """Until the front has that many; returns the fleet's status."""
    until_s = time.monotonic() + SERVING_TIMEOUT_S
    while time.monotonic() < until_s:
        fleet: dict[str, Any] = (await status_of(port))["fleet"]
        if sum(one["state"] == "serving" for one in fleet["replicas"]) == count:
            return fleet
        await asyncio.sleep(0.1)
    raise SystemExit(f"not {count} replicas serve: {fleet['replicas']}")


async def streams_and_kill(
    processes: Processes, port: int, texts: list[str], tokens: int, kill: str | None
) -> tuple[list[Answer], float]:
    """All at once; one replica is killed after a second. Returns when that was."""
    running = [asyncio.create_task(stream(port, text, tokens)) for text in texts]
    await asyncio.sleep(1.0)
    kill_s = time.perf_counter()
    if kill is not None:
        processes.running.pop(kill).kill()
    return list(await asyncio.gather(*running)), kill_s


def kills(args: argparse.Namespace, folder: Path, flags: list[str]) -> dict[str, Any]:
    """Kill one replica after the other under load."""
    texts = prompts(args.users, 20)
    rounds: list[dict[str, Any]] = []
    client_pauses_s: list[float] = []
    with Processes(folder, flags) as processes:
        for name in REPLICAS:
            processes.start_replica(name)
        processes.wait_for_replicas(*REPLICAS)
        port = processes.start_front("front", "--route", "round-robin")
        asyncio.run(wait_for_serving(port, 2))
        expected, _ = asyncio.run(streams_and_kill(processes, port, texts, args.tokens, None))
        for number in range(args.kills):
            name = REPLICAS[number % 2]
            before = asyncio.run(status_of(port))["fleet"]
            answers, kill_s = asyncio.run(
                streams_and_kill(processes, port, texts, args.tokens, name)
            )
            after = asyncio.run(status_of(port))["fleet"]
            moved = sum(after["resumed"].values()) - sum(before["resumed"].values())
            over = sorted((gap_over(answer, kill_s) for answer in answers), reverse=True)
            client_pauses_s += over[:moved]
            rounds.append(
                {
                    "ended_well": sum(one.finish == "length" and not one.error for one in answers),
                    "same_tokens": sum(
                        a.token_ids == b.token_ids for a, b in zip(answers, expected, strict=True)
                    ),
                    "resumed": moved,
                    "tie_gaps": asyncio.run(tie_gaps(port, texts, answers, expected)),
                    "errors": sorted({one.error for one in answers if one.error}),
                }
            )
            record.say(f"kill {number}: {rounds[-1]}")
            processes.start_replica(name)
            asyncio.run(wait_for_serving(port, 2))
        fleet = asyncio.run(status_of(port))["fleet"]
    return {
        "rounds": rounds,
        "pause_s": fleet["pause_s"],
        "client_pause_s": record.percentiles(client_pauses_s, digits=3),
        "undisturbed_gap_s": record.percentiles([a.longest_gap_s for a in expected], digits=3),
    }


async def tie_gaps(
    port: int, texts: list[str], answers: list[Answer], expected: list[Answer]
) -> list[float]:
    """Of answers that differ: how far apart the logits of the two tokens are, where they part.

    Rounding depends on who else is in a batch, so that one of two equal tokens may be either.
    """
    gaps = []
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120
    ) as http:
        for text, answer, other in zip(texts, answers, expected, strict=True):
            pairs = enumerate(zip(answer.token_ids, other.token_ids, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), None)
            if place is None:
                continue
            prompt = (await http.post("/tokenize", json={"prompt": text})).json()["tokens"]
            body = {"prompt": prompt + other.token_ids[:place], "max_tokens": 1, "logprobs": 2}
            told = (await http.post("/v1/completions", json=body | {"temperature": 0})).json()
            likely = sorted(told["choices"][0]["logprobs"]["top_logprobs"][0].values())
            gaps.append(likely[-1] - likely[-2])
    return gaps


def gap_over(answer: Answer, moment_s: float) -> float:
    """The longest time between two chunks from a moment on, the one around it included."""
    times = [one for one in answer.times_s if one >= moment_s]
    before = [one for one in answer.times_s if one < moment_s][-1:]
    gaps = [b - a for a, b in zip(before + times, times, strict=False)]
    return max(gaps, default=0.0)


@contextlib.contextmanager
def store(folder: Path) -> Iterator[str]:
    """The address of a Redis server with a bound, on a Unix socket."""
    path = folder / "store.sock"
    command = [
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        str(path),
        "--save",
        "",
        "--appendonly",
    ]
    command += ["no", "--maxmemory", "512mb", "--maxmemory-policy", "allkeys-lru"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not path.exists():
            time.sleep(0.05)
        yield f"unix://{path}"
    finally:
        server.terminate()
        server.wait()


async def turn(port: int, token_ids: list[int], tokens: int) -> tuple[list[int], int]:
    """One turn, not streamed: the tokens of the answer, and those of the prompt that were found."""
    body = {"prompt": token_ids, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    async with httpx.AsyncClient(trust_env=False, timeout=300) as http:
        url = f"http://127.0.0.1:{port}/v1/completions"
        answer = (await http.post(url, json={**body, "return_token_ids": True})).json()
    if "choices" not in answer:
        raise SystemExit(json.dumps(answer))
    found = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return answer["choices"][0]["token_ids"], found


async def turns(
    port: int, conversations: list[list[int]], tokens: int
) -> list[tuple[list[int], int]]:
    """A turn of each, four at a time."""
    at_once = asyncio.Semaphore(4)

    async def one(conversation: list[int]) -> tuple[list[int], int]:
        async with at_once:
            return await turn(port, conversation, tokens)

    return list(await asyncio.gather(*map(one, conversations)))


def drain(
    args: argparse.Namespace, folder: Path, flags: list[str], drained: bool
) -> dict[str, Any]:
    """Two turns of each conversation, with a drain between where asked."""
    conversations = [[5 + (i * 31 + j * 7) % 900 for j in range(800)] for i in range(args.talks)]
    with Processes(folder, flags) as processes:
        for name in REPLICAS:
            processes.start_replica(name, "--drain-s", "5")
        processes.wait_for_replicas(*REPLICAS)
        port = processes.start_front("front", "--route", "cost")
        asyncio.run(wait_for_serving(port, 2))
        answers = asyncio.run(turns(port, conversations, 16))
        shares = asyncio.run(status_of(port))["fleet"]["replicas"]
        start_s = time.perf_counter()
        if drained:
            status = processes.end(REPLICAS[0])
            if status:
                raise SystemExit(f"the drained replica ended with {status}")
            asyncio.run(wait_for_serving(port, 1))
        drain_s = time.perf_counter() - start_s
        longer = [
            talk + answer + [7, 11, 13]
            for talk, (answer, _) in zip(conversations, answers, strict=True)
        ]
        found = [count for _, count in asyncio.run(turns(port, longer, 4))]
        totals = asyncio.run(status_of(port))["totals"]
    whole = sum(len(talk) for talk in longer)
    return {
        "conversations": len(longer),
        "at the drained replica": sum(shares[0]["routed"].values()) if drained else 0,
        "found of the second turns": f"{sum(found) / whole:.1%}",
        "conversations with nothing found": sum(count == 0 for count in found),
        "drain, s": round(drain_s, 1) if drained else None,
        "written to the store, MB": round(totals["moved_bytes"].get("host>remote", 0) / 1e6, 1),
        "read from it, MB": round(totals["moved_bytes"].get("remote>host", 0) / 1e6, 1),
    }


def drains(args: argparse.Namespace, folder: Path, flags: list[str]) -> list[dict[str, Any]]:
    """Without a drain, and with one, with a store and without."""
    rows = []
    for name, drained, has_store in (
        ("no drain, no store", False, False),
        ("drain, no store", True, False),
        ("drain, shared store", True, True),
    ):
        if has_store and shutil.which("redis-server") is None:
            record.say("redis-server is not here: no run with a store")
            continue
        place = folder / name.replace(" ", "_").replace(",", "")
        place.mkdir()
        with contextlib.ExitStack() as stack:
            extra = ["--host-gib", "0.25"]
            if has_store:
                secret = place / "secret"
                secret.write_text("f" * 64 + "\n")
                secret.chmod(0o600)
                extra += ["--remote", stack.enter_context(store(place))]
                extra += ["--remote-secret-file", str(secret)]
            rows.append({"run": name, **drain(args, place, flags + extra, drained)})
        record.say(str(rows[-1]))
    return rows


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    kill = result["kill"]
    moved = sum(one["resumed"] for one in kill["rounds"])
    answers = len(kill["rounds"]) * result["users"]
    well = sum(one["ended_well"] for one in kill["rounds"])
    same = sum(one["same_tokens"] for one in kill["rounds"])
    gaps = [gap for one in kill["rounds"] for gap in one["tie_gaps"]]
    others = f" Where the others part, two tokens were {max(gaps):.1e} apart." if gaps else ""
    return (
        "# A replica is killed, and a replica drains\n\n"
        f"**Kill.** {result['users']} streams of {result['tokens']} tokens over two replicas, one "
        f"of which gets SIGKILL after a second, {len(kill['rounds'])} times: {well} of {answers} "
        f"streams ended well, {same} with the tokens of an undisturbed run, {moved} went on at the "
        f"other replica.{others}\n\n"
        f"- pause of these as the front saw it: p50 {kill['pause_s']['p50']:.2f} s, p99 "
        f"{kill['pause_s']['p99']:.2f} s\n"
        f"- as clients saw it: p50 {kill['client_pause_s']['p50']:.2f} s, p99 "
        f"{kill['client_pause_s']['p99']:.2f} s\n"
        "- longest gap of a stream without a kill: p50 "
        f"{kill['undisturbed_gap_s']['p50']:.2f} s, p99 "
        f"{kill['undisturbed_gap_s']['p99']:.2f} s\n\n"
        "**Drain.** Conversations of 800 tokens and an answer; then one of two replicas drains, "
        "and each conversation has a second turn:\n\n"
        f"{record.table(result['drain'])}\n\n{record.footer(result)}"
    )


def main() -> None:
    parser = record.arguments(__doc__ or "", out="results, without suffix")
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--talks", type=int, default=16)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: exit(1))  # all that was started ends with this
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_model(folder / "model", layers=8, hidden=512)
        flags = ["--model", str(model), "--hot-gib", "0.25", "--max-model-len", "2048"]
        drained = drains(args, folder, flags)
        killed = kills(args, folder, flags)
    shown = {"users": args.users, "tokens": args.tokens, "conversations": args.talks}
    result = record.start(seed=0, **shown, kill=killed, drain=drained)
    record.write(args.out, result, page(result))
    print(page(result))


if __name__ == "__main__":
    main()
