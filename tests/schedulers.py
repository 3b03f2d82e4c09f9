"""Schedulers over a KV cache without bytes, and steps of them."""

import itertools

from fakes import FakeClock, FakeTiers

from hotset.cost.prefix import PrefixPolicy
from hotset.cost.rates import Rates
from hotset.engine.scheduler import Scheduler
from hotset.engine.step import Step
from hotset.engine.step_cost import StepCost
from hotset.kv.cache import KVCache
from hotset.kv.index_blocks import IndexBlocks
from hotset.kv.pool import BlockPool
from hotset.kv.seats import Seats
from hotset.metrics import Metrics
from hotset.request import FinishReason, SamplingParams
from hotset.sequence import Request

BLOCK = 4


def make_scheduler(
    tiers: FakeTiers | None = None,
    *,
    num_blocks: int = 8,
    max_num_seqs: int = 8,
    budget: int = 16,
    mixed_budget: int = 16,
    bursts: bool = False,
    row_tile: int = 1,
    prefix_caching: bool = True,
    mode: str = "fetch",
    rotation_s: float | None = None,
    ahead_tokens: int = 256,
    hot_blocks: int = 0,
    step_cost: StepCost | None = None,
    clock: FakeClock | None = None,
    metrics: Metrics | None = None,
) -> Scheduler:
    rates = Rates(1.0, {"host": 1.0, "disk": 1.0})
    metrics, pool = metrics or Metrics(), BlockPool(num_blocks)
    kv = KVCache(
        pool,
        block_size=BLOCK,
        fingerprint="model",
        metrics=metrics,
        tiers=tiers,
        policy=None if tiers is None else PrefixPolicy(rates, bytes_per_token=1, mode=mode),
        prefix_caching=prefix_caching,
        seats=Seats(num_seats=8, num_slots=hot_blocks * BLOCK, block_size=BLOCK)
        if hot_blocks
        else None,
        index_blocks=IndexBlocks(pool, first=num_blocks + 1, row_bytes=80, index_bytes=10),
    )
    return Scheduler(
        kv,
        metrics=metrics,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_mixed_tokens=mixed_budget,
        bursts=bursts,
        row_tile=row_tile,
        rotation_s=rotation_s,
        ahead_tokens=ahead_tokens,
        users_at_once=lambda wanted, context: wanted,
        step_cost=step_cost,
        clock=clock or FakeClock(),
    )


_ids = itertools.count()


def make_request(tokens: list[int], *, max_tokens: int = 4, **fields: object) -> Request:
    return Request(
        request_id=f"r{next(_ids)}",
        prompt_len=len(tokens),
        token_ids=list(tokens),
        params=SamplingParams(max_tokens=max_tokens),
        max_total_tokens=len(tokens) + max_tokens,
        **fields,  # type: ignore[arg-type]
    )


def run(scheduler: Scheduler, plan: Step | None = None) -> Step:
    """One step: schedule, 'compute', append a token to those that sample, finish at the limit."""
    scheduler.kv.poll()
    plan = plan or scheduler.schedule()
    sampling = [item.request for item in plan.items if item.samples]
    scheduler.commit(plan)
    for request in sampling:
        request.token_ids.append(100 + request.num_tokens)
        if request.num_tokens >= request.max_total_tokens:
            scheduler.finish(request, FinishReason.LENGTH)
    return plan


def tokens_of(plan: Step) -> list[tuple[int, int]]:
    return [(item.start, item.num_tokens) for item in plan.items]


def fill_host_then_forget_device(scheduler: Scheduler, tiers: FakeTiers, tokens: list[int]) -> None:
    whole = tokens[: len(tokens) // BLOCK * BLOCK]
    scheduler.add([make_request(whole, max_tokens=1)])
    while scheduler.has_requests:
        run(scheduler)
    tiers.end_all()
    scheduler.kv.poll()
    scheduler.kv.pool.forget_cached()
