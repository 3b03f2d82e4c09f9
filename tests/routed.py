"""Replicas that tell a route what a test has them tell."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fakes import FakeClock

from hotset.engine.messages import EngineInfo, Load, Report, Submit
from hotset.fleet.route import Choice
from hotset.fleet.router import KnowingRoute
from hotset.kv.block_hash import block_hash, root_hash
from hotset.memory.journal import JournalPart
from hotset.options import Options
from hotset.request import SamplingParams

# Llama-3.1-8B on one H200, over a link of 50 GB/s.
RATE, KV_BYTES, LINK = 35_000.0, 131_072, 50e9
PROMPT, WARM, BLOCK = 12_035, 11_000, 8
DEVICE, HOST, REMOTE = 1, 3, 7  # codes of what is there
LOAD = Load(
    queued_tokens=0,
    spare_blocks=2**30,
    usable_blocks=2**30,
    queued_bytes=0,
    num_open=1,
    step_s=0.0,
    prefill_tokens_per_s=RATE,
    link_bytes_per_s={"host": LINK},
    prefilled_tokens=0,
    prompt_step_s=0.0,
    freed_blocks=0,
)


def info(fingerprint: str = "model", block_size: int = BLOCK, **options: Any) -> EngineInfo:
    options = Options.of(**options)
    return EngineInfo(options, 10**6, "", False, fingerprint, block_size, KV_BYTES)


@dataclass
class Host:
    """What a route asks of a host."""

    info: EngineInfo
    num_follows: int = 0

    def follow(self, is_on: bool) -> None:
        assert is_on
        self.num_follows += 1


def keys_of(token_ids: list[int], fingerprint: str = "model", salt: bytes = b"") -> list[bytes]:
    key, keys = root_hash(fingerprint, salt), []
    for start in range(0, len(token_ids) - BLOCK + 1, BLOCK):
        key = block_hash(key, token_ids[start : start + BLOCK])
        keys.append(key)
    return keys


def snapshot(keys: list[bytes], code: int = DEVICE, first: int = 0) -> JournalPart:
    content = b"".join(key + bytes([code]) for key in keys)
    return JournalPart(first, b"", content, begins=True, ends=True)


class Fleet:
    """A route with replicas that tell what a test has them tell."""

    def __init__(self, route: type[KnowingRoute], names: str = "ab", **options: Any) -> None:
        self.clock, self.num_sent = FakeClock(), 0
        self.route = route(self.clock, seed=0)
        self.hosts = {name: Host(info(**options)) for name in names}
        for name, host in self.hosts.items():
            self.route.join(name, host)  # type: ignore[arg-type]
            self.tell(name, snapshot([]))

    def tell(self, name: str, journal: JournalPart | None = None, **changes: Any) -> None:
        self.route.take(name, Report(0.0, journal=journal, load=replace(LOAD, **changes)))

    def journal(self, name: str, part: JournalPart) -> None:
        self.route.take(name, Report(0.0, journal=part))

    def busy(self, share: float) -> None:
        """All replicas have computed for this share of the last ten seconds."""
        self.clock.now_s += 20.0
        for done in (0.0, share):
            for name in self.hosts:
                self.tell(name, prompt_step_s=done * 10)
            self.clock.now_s += 10.0
        self.clock.now_s -= 10.0

    def choose(
        self, token_ids: list[int], names: Sequence[str] | None = None, **submit: Any
    ) -> Choice:
        self.num_sent += 1
        one = Submit(f"id-{self.num_sent}", token_ids, SamplingParams(), **submit)  # type: ignore
        return self.route.choose(one, list(names or self.hosts))


def prompt(length: int = PROMPT) -> list[int]:
    return random.Random(3).choices(range(1000), k=length)
