"""Requests of sparse attention by the hundred, hot and resident, with all going wrong that can."""

import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from engines import run
from tiny_models import SPARSE_FAMILIES

from hotset.engine.engine import Engine
from hotset.errors import OutOfBlocksError
from hotset.executor.sampler import PendingTokens
from hotset.executor.step_input import SampleInput
from hotset.request import FinishReason, SamplingParams
from hotset.sequence import Request

MAX_TOKENS = 20
WIDE = {"kv_lora_rank": 72}  # rows are five times as wide as index keys
# What a run is for; one of many requests has each of them.
EVENTS = (
    *(
        "turned_hot",
        "preempted_hot",
        "gone_on_hot",
        "preempted",
        "aborted",
        "forked",
        "mixed_steps",
    ),
    *("host_full", "step_failed", "not_finite", "disk_io_error", "disk_corrupt", "disk_full"),
    *("found in device", "found in host", "found in disk"),
)


def soak(
    make_engine: Callable[..., Engine], seed: int, num_requests: int, folder: Path
) -> Counter[str]:
    """Run requests to their ends; every answer must be a resident engine's, and all come back.

    Answers of requests that were aborted, that a failed step ended, or whose logits were NaN, must
    be its beginning. With some seeds index keys have 8 bits.

    Args:
        make_engine: `engines.make_engine`, whose engines the caller closes.
        seed: of the family, the sizes and all that happens.
        num_requests: some have two outputs.
        folder: of the disk tier.

    Returns:
        How often each of `EVENTS` happened, and more.
    """
    rng = random.Random(seed)
    family = rng.choice(list(SPARSE_FAMILIES))
    prompts = make_prompts(rng, num_requests)
    same = {"model_changes": WIDE, "seed": seed, "index_dtype": "fp8" if seed % 3 == 2 else "auto"}
    resident = make_engine(family, hot_blocks=1000, hot_tokens=0, **same)
    expected = run(resident, prompts, max_tokens=MAX_TOKENS)
    engine = make_engine(
        family,
        **same,
        hot_blocks=rng.randint(40, 60),
        host_blocks=rng.choice([30, 60, 120]),  # one context takes up to 21
        hot_tokens=rng.choice([16, 20, 32]),
        row_prefetch=rng.randint(0, 2),
        max_num_seqs=rng.randint(4, 12),
        max_num_batched_tokens=rng.choice([16, 64, 512]),
        overlap=rng.random() < 0.5,
        fetch_policy="fetch",
        disk_mib=3,
        disk_path=folder,
    )
    with (
        faults_of_disk(rng),
        faults_of_host_memory(engine, rng),
        faults_of_fetches(engine, rng),
        faults_of_logits(engine, seed),
    ):
        return _Soak(engine, rng, prompts, expected).run()


def make_prompts(rng: random.Random, num: int) -> list[list[int]]:
    """Prompts of 17 to 64 tokens, with six beginnings."""
    heads = [_tokens(rng, rng.randint(16, 40)) for _ in range(6)]
    return [rng.choice(heads) + _tokens(rng, rng.randint(1, 24)) for _ in range(num)]


def _tokens(rng: random.Random, num: int) -> list[int]:
    return [rng.randrange(3, 256) for _ in range(num)]


class _Soak:
    """Requests that come and go."""

    def __init__(
        self,
        engine: Engine,
        rng: random.Random,
        prompts: list[list[int]],
        expected: list[list[int]],
    ) -> None:
        self._engine, self._rng = engine, rng
        self._pending = list(zip(prompts, expected, strict=True))
        self._wanted: dict[tuple[str, int], list[int]] = {}
        self._outputs: dict[tuple[str, int], list[int]] = {}
        self._reasons: dict[tuple[str, int], FinishReason] = {}
        self._events: Counter[str] = Counter()
        self._hot: Any = engine.kv.hot

    def run(self) -> Counter[str]:
        with patch.object(self._hot, "go_on", partial(self._go_on, self._hot.go_on)):
            return self._run()

    def _go_on(self, go_on: Callable[..., bool], request: Request) -> bool:
        did = go_on(request)
        self._events["gone_on_hot"] += did
        return did

    def _run(self) -> Counter[str]:
        engine, rng = self._engine, self._rng
        while self._pending or engine.has_work:
            self._add(rng.choice([0, 0, 1, 2, 8]))
            self._step()
            if rng.random() < 0.04:
                self._abort()
            if rng.random() < 0.08 and len(engine.scheduler.running) > 1:
                self._preempt()
            if rng.random() < 0.03:
                engine.kv.pool.forget_cached()
            engine.kv.check()
            self._events["steps"] += 1
            assert self._events["steps"] < 200 * len(self._wanted) + 1000, "it does not end"
        self._check_answers()
        check_all_is_back(engine)
        self._count()
        return self._events

    def _add(self, most: int) -> None:
        for _ in range(min(most, len(self._pending))):
            prompt, wanted = self._pending.pop()
            num = self._rng.choice([1, 1, 1, 2])
            params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, n=num)
            request_id = self._engine.add_request(prompt, params)
            for index in range(num):
                self._wanted[request_id, index], self._outputs[request_id, index] = wanted, []

    def _step(self) -> None:
        for output in self._engine.step():
            key = output.request_id, output.index
            self._outputs[key] += output.token_ids
            if output.finish_reason is not None:
                self._reasons[key] = output.finish_reason
        seated = [request.kv.seat is not None for request in self._engine.scheduler.running]
        self._events["mixed_steps"] += any(seated) and not all(seated)

    def _preempt(self) -> None:
        scheduler = self._engine.scheduler
        victim = self._rng.choice(scheduler.running)
        self._events["preempted_hot"] += victim.kv.seat is not None
        scheduler.running.remove(victim)
        scheduler._preempt(victim)

    def _abort(self) -> None:
        open_ids = sorted({key[0] for key in self._wanted.keys() - self._reasons.keys()})
        if open_ids:
            self._engine.abort(self._rng.choice(open_ids))

    def _check_answers(self) -> None:
        assert self._reasons.keys() == self._wanted.keys()
        for key, wanted in self._wanted.items():
            found = self._outputs[key]
            if self._reasons[key] is FinishReason.LENGTH:
                assert found == wanted, key
            else:
                assert found == wanted[: len(found)], key
        self._events.update(f"ended by {reason.value}" for reason in self._reasons.values())

    def _count(self) -> None:
        metrics = self._engine.metrics
        self._engine.take_counts()
        self._events += Counter(
            requests=len({request_id for request_id, _ in self._wanted}),
            outputs=len(self._wanted),
            turned_hot=metrics.turned_hot,
            preempted=metrics.preemptions,
            aborted=self._events["ended by abort"],
            forked=metrics.forked_tokens,
            hot_hits=metrics.hot_hits,
            hot_misses=metrics.hot_misses,
            hot_guessed=metrics.hot_guessed,
        )
        self._events += metrics.faults
        for tier, num_tokens in metrics.cached_tokens.items():
            self._events[f"found in {tier}"] += num_tokens


def check_all_is_back(engine: Engine) -> None:
    """Nothing is held or kept, in any tier, once copies have ended."""
    while engine.has_transfers:
        engine.step()
    kv, tiers = engine.kv, engine.tiers
    kv.poll()
    kv.check()
    assert kv.hot is not None and kv.tables.index_blocks is not None and tiers is not None
    assert kv.pool.num_held == 0 and kv.hot.num_hot == 0
    seats = kv.hot._seats
    assert seats.num_free == seats.num_seats
    assert kv.tables.index_blocks.num_used == 0
    tiers.check()
    assert not any(payload.pins for payload in tiers.host._payloads.values())
    assert tiers.host.num_evictable == tiers.host.num_slots


@contextmanager
def faults_of_disk(rng: random.Random) -> Iterator[None]:
    """Reads and writes fail, end early, or bring another bit, now and then."""
    chance, preadv, pwritev = random.Random(rng.random()), os.preadv, os.pwritev

    def faulty(call: Any, fd: int, buffers: list[memoryview], offset: int) -> int:
        roll = chance.random()
        if roll < 0.03:
            raise OSError(chance.choice([errno.EIO, errno.ENOSPC]), "injected")
        count = int(call(fd, buffers, offset))
        if roll > 0.95 and call is preadv:
            buffers[0][chance.randrange(count)] ^= 1 << chance.randrange(8)
        return count

    with (
        patch.object(os, "preadv", lambda *args: faulty(preadv, *args)),
        patch.object(os, "pwritev", lambda *args: faulty(pwritev, *args)),
        patch("hotset.memory.disk.tier._PAUSE_S", 0.002),
    ):
        yield


@contextmanager
def faults_of_host_memory(engine: Engine, rng: random.Random) -> Iterator[None]:
    """Now and then there is no slot to be had, for a spill or a read from disk."""
    assert engine.tiers is not None
    host: Any = engine.tiers.host
    reserve = host.reserve

    def refuse(*args: Any) -> Any:
        if rng.random() < 0.02:
            raise OutOfBlocksError("injected")
        return reserve(*args)

    with patch.object(host, "reserve", refuse):
        yield


@contextmanager
def faults_of_fetches(engine: Engine, rng: random.Random) -> Iterator[None]:
    """Now and then the rows that a layer is told to have do not come: the step breaks off."""
    hot: Any = engine.executor.runner._hot  # type: ignore[attr-defined]
    gather = hot._gather

    def break_off(*args: Any, **options: Any) -> None:
        if rng.random() < 0.002:
            raise RuntimeError("injected")
        gather(*args, **options)

    with patch.object(hot, "_gather", break_off):
        yield


@contextmanager
def faults_of_logits(engine: Engine, seed: int) -> Iterator[None]:
    """Now and then one request's are NaN."""
    sampler: Any = engine.executor.sampler  # type: ignore[attr-defined]
    chance, submit = random.Random(seed), sampler.submit

    def poison(logits: torch.Tensor, sample: SampleInput) -> PendingTokens:
        rows = [row for row in range(len(logits)) if chance.random() < 0.004]
        if rows:
            logits = logits.clone()
            logits[rows] = torch.nan
        pending: PendingTokens = submit(logits, sample)
        return pending

    with patch.object(sampler, "submit", poison):
        yield
