"""A fleet of two replicas over slow, lossy and cut links: answers, moves, and pauses of streams.

    python benchmarks/fleet_networks.py --out benchmarks/results/fleet_networks

Needs to be root. Each replica is in a network namespace of its own; `slow_links.py` carries its
packets, as kernels without `tc netem` can do. The front and the clients are outside. Every run has
the same greedy requests, and its answers are compared with those over undisturbed links, token by
token.
"""

import argparse
import asyncio
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
from fleet_processes import (
    Answer,
    Processes,
    is_root_with_tun,
    prompts,
    small_model,
    status_of,
    stream,
)
from slow_links import Conditions, Link, links

PORT = 7900
CUT_AFTER_S = 1.0
BACK_TIMEOUT_S = 90.0
CLEAN = Conditions()


@dataclass(frozen=True, slots=True)
class Case:
    """What the links are like in a run.

    Attributes:
        always: of both links, for the whole run.
        cut: of the first link, from one second on, for `cut_s`.
    """

    name: str
    always: Conditions = CLEAN
    cut: Conditions = CLEAN
    cut_s: float = 0.0


BOTH_WAYS = Conditions(is_cut_in=True, is_cut_out=True)
CASES = (
    Case("undisturbed"),
    Case("50 ms +- 20 each way", Conditions(delay_s=0.05, jitter_s=0.02)),
    Case("1 % of packets lost", Conditions(loss=0.01)),
    Case("10 Mbit/s", Conditions(bytes_per_s=1.25e6)),
    Case(
        "50 ms +- 20, 1 % lost, 10 Mbit/s",
        Conditions(delay_s=0.05, jitter_s=0.02, loss=0.01, bytes_per_s=1.25e6),
    ),
    Case("cut for 3 s", cut=BOTH_WAYS, cut_s=3.0),
    Case("cut for 30 s", cut=BOTH_WAYS, cut_s=30.0),
    Case("nothing to the replica for 30 s", cut=Conditions(is_cut_in=True), cut_s=30.0),
    Case("nothing from the replica for 30 s", cut=Conditions(is_cut_out=True), cut_s=30.0),
)


async def cut(link: Link, case: Case) -> None:
    """Cut the link for a while, in the middle of the streams."""
    await asyncio.sleep(CUT_AFTER_S)
    link.set(case.cut)
    await asyncio.sleep(case.cut_s)
    link.set(CLEAN)


async def answers_over(
    port: int, network: list[Link], case: Case, args: argparse.Namespace
) -> tuple[list[Answer], float]:
    """All requests at once; returns when the links are undisturbed again."""
    for link in network:
        link.set(case.always)
    cutting = asyncio.create_task(cut(network[0], case)) if case.cut_s else None
    start_s = time.perf_counter()
    texts = prompts(args.users, 20)
    answers = await asyncio.gather(*(stream(port, text, args.tokens) for text in texts))
    wall_s = time.perf_counter() - start_s
    if cutting is not None:
        await cutting
    for link in network:
        link.set(CLEAN)
    return answers, wall_s


async def wait_until_all_serve(port: int, count: int) -> float:
    """Seconds until the front has that many replicas again."""
    start_s = time.perf_counter()
    while time.perf_counter() - start_s < BACK_TIMEOUT_S:
        fleet = (await status_of(port))["fleet"]
        if sum(one["state"] == "serving" for one in fleet["replicas"]) >= count:
            return time.perf_counter() - start_s
        await asyncio.sleep(0.2)
    raise SystemExit(f"after {BACK_TIMEOUT_S:g} s not all replicas serve: {fleet['replicas']}")


def grown(before: dict[str, Any], after: dict[str, Any], name: str) -> int:
    """Of a count by reason, how much it has grown in all."""
    return sum(after[name].values()) - sum(before[name].values())


async def run_case(
    port: int, network: list[Link], case: Case, args: argparse.Namespace, expected: list[list[int]]
) -> dict[str, Any]:
    """One run, as a row; fills `expected` where it is empty."""
    before = (await status_of(port))["fleet"]
    answers, wall_s = await answers_over(port, network, case, args)
    back_s = await wait_until_all_serve(port, len(network))
    after = (await status_of(port))["fleet"]
    if not expected:
        expected += [answer.token_ids for answer in answers]
    gaps_s = [answer.longest_gap_s for answer in answers]
    well = [one for one in answers if one.error is None and one.finish == "length"]
    equal = [a.token_ids == b for a, b in zip(answers, expected, strict=True)]
    return {
        "links": case.name,
        "ended well": f"{len(well)} of {len(answers)}",
        "same tokens": sum(equal),
        "gone on elsewhere": grown(before, after, "resumed"),
        "submitted again": grown(before, after, "retried"),
        "links lost": after["lost"] - before["lost"],
        "late outputs dropped": after["late_outputs"] - before["late_outputs"],
        "wall, s": round(wall_s, 2),
        "first token p50, s": round(sorted(a.ttft_s for a in well)[len(well) // 2], 3),
        "longest gap, s": round(max(gaps_s), 3),
        "replica back after, s": round(back_s, 1) if case.cut_s else None,
        "errors": sorted({one.error for one in answers if one.error}) or None,
    }


def losses(log: Path) -> list[str]:
    """The lines in which the front says that it has lost a replica, and why."""
    lines = log.read_text("utf-8").splitlines()
    return [line.partition(" warning ")[2] for line in lines if " is gone: " in line]


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    return (
        "# A fleet over slow, lossy and cut links\n\n"
        f"Two replicas, each in a network namespace of its own, {result['users']} streams of "
        f"{result['tokens']} tokens at once, greedy. A cut is of the first replica's link and "
        f"begins {CUT_AFTER_S:g} s after the requests. 'Same tokens' counts answers that equal "
        "those over undisturbed links, token by token.\n\n"
        f"{record.table(result['cases'])}\n\n"
        "Packets are carried between TUN devices by `slow_links.py`, as this kernel was built "
        "without `netem`; TCP is the kernel's. The link's heartbeat is due every second, and a "
        "link is given up after 5 s of silence.\n\n"
        f"{record.footer(result)}"
    )


def main() -> None:
    parser = record.arguments(__doc__ or "", out="results, without suffix")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--only", help="run cases whose name has this in it, and the first")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: exit(1))  # all that was started ends with this
    if not is_root_with_tun():
        raise SystemExit("this needs root and /dev/net/tun, for network namespaces")
    cases = [one for one in CASES if one is CASES[0] or (args.only or "") in one.name]
    rows: list[dict[str, Any]] = []
    expected: list[list[int]] = []
    num_lost = 0
    with tempfile.TemporaryDirectory() as folder, links(2) as network:
        model = small_model(Path(folder) / "model", layers=8, hidden=512)
        flags = ["--model", str(model), "--hot-gib", "0.5", "--max-model-len", "2048"]
        with Processes(Path(folder), flags) as processes:
            names = [f"replica-{i}" for i in range(len(network))]
            for name, link in zip(names, network, strict=True):
                listen = f"{link.inside}:{PORT}"
                processes.start_replica(name, "--listen", listen, netns=link.netns)
            processes.wait_for_replicas(*names)
            port = processes.start_front("front", "--route", "round-robin")
            asyncio.run(wait_until_all_serve(port, len(network)))
            for case in cases:
                rows.append(asyncio.run(run_case(port, network, case, args, expected)))
                lost = losses(Path(folder) / "front.log")
                rows[-1]["why lost"], num_lost = "; ".join(lost[num_lost:]) or None, len(lost)
                record.say(str(rows[-1]))
                result = record.start(seed=0, users=args.users, tokens=args.tokens, cases=rows)
                record.write(args.out, result, page(result))
    print(page(result))


if __name__ == "__main__":
    main()
