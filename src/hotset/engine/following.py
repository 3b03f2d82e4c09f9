"""What those who follow an engine are told beside outputs: its journal and its load.

Imports no torch.
"""

from typing import TYPE_CHECKING

from hotset.clock import Clock
from hotset.engine.kv_events import EventPublisher, KvEvents
from hotset.engine.messages import Load, Queued, Submit, num_pairs, size_class
from hotset.memory.journal import Journal, JournalPart

if TYPE_CHECKING:
    from hotset.engine.engine import Engine

_LOAD_EVERY_S = 0.1


class Following:
    """Parts of reports that are there only while a front follows the engine, and events.

    Used by the engine's thread alone.

    Args:
        engine: as it is between two steps.
        clock: says when the load is due again.

    Raises:
        ConfigError: events are asked for and cannot be published.
    """

    def __init__(self, engine: "Engine", clock: Clock) -> None:
        self._engine, self._clock = engine, clock
        self._journal = Journal(
            *(
                {"device": lane.kv.pool, **({} if lane.tiers is None else lane.tiers.sources())}
                for lane in engine.lanes
            )
        )
        self._waiting: dict[str, Submit] = {}  # by the request's id
        self._num_waiting_tokens = 0  # of the prompts of these
        self._queue: tuple[Queued, ...] = ()  # what is to be computed of them
        self._is_on = False
        self._load: Load | None = None  # that was told last
        self._due_s = 0.0
        self._events: KvEvents | None = None
        runtime = engine.options.runtime
        if runtime.kv_events is not None:
            self._publisher = EventPublisher(runtime.kv_events, runtime.kv_events_topic)
            self._events = KvEvents(engine.kv.block_size)
            for lane in engine.lanes:
                lane.kv.prefixes.on_name = self._events.name
            self._journal.follow(True)

    def follow(self, is_on: bool) -> None:
        """See `EngineHost.follow`."""
        self._is_on, self._load = is_on, None
        self._journal.follow(is_on or self._events is not None)

    def close(self) -> None:
        """Send the events that wait, and end."""
        if self._events is not None:
            self._publisher.close()

    def arrive(self, submit: Submit) -> None:
        """A request waits for its first step."""
        self._waiting[submit.request_id] = submit
        self._count(submit, 1)

    def start(self, request_id: str) -> None:
        """A request waits no longer, if it did."""
        submit = self._waiting.pop(request_id, None)
        if submit is not None:
            self._count(submit, -1)

    def _count(self, submit: Submit, sign: int) -> None:
        num_tokens, expected = len(submit.token_ids), submit.expected_tokens
        self._num_waiting_tokens += sign * num_tokens
        left = num_tokens if expected is None else expected
        self._queue = _with(self._queue, left, num_tokens, sign)

    def wait_s(self, most_s: float | None) -> float | None:
        """How long an engine without requests may wait, `most_s` at most, before there is more."""
        return 0.0 if self._journal.has_news else most_s

    def news(self, num_open: int) -> tuple[JournalPart | None, Load | None]:
        """What is to be told now, when `num_open` requests have not ended."""
        journal, load = self._journal.take(), None
        if journal is not None and self._events is not None:
            events, is_lost = self._events.take(journal)
            if is_lost:
                self._journal.follow(True)
            if events:
                self._publisher.publish(events)
        if not self._is_on:
            return None, None
        if self._clock.now() >= self._due_s or not num_open:
            load = self._load_now(num_open)
            if load == self._load:
                load = None
            else:
                self._load, self._due_s = load, self._clock.now() + _LOAD_EVERY_S
        return journal, load

    def _load_now(self, num_open: int) -> Load:
        engine = self._engine
        schedulers = [lane.scheduler for lane in engine.lanes]
        pools = [lane.kv.pool for lane in engine.lanes]
        running = (one for scheduler in schedulers for one in scheduler.running)
        queue = self._queue
        for one in running:
            left = one.prompt_len - one.kv.num_computed_tokens
            if left > 0:
                queue = _with(queue, left, one.prompt_len)
        needed = sum(scheduler.num_blocks_ahead for scheduler in schedulers)
        needed += -(-self._num_waiting_tokens // engine.kv.block_size)
        stacks = [lane.tiers for lane in engine.lanes if lane.tiers is not None]
        return Load(
            queued_tokens=sum(one.num_tokens for one in queue),
            spare_blocks=sum(pool.num_available for pool in pools) - needed,
            usable_blocks=sum(pool.num_usable for pool in pools),
            queued_bytes=sum(tiers.queued_fetch_bytes() for tiers in stacks),
            num_open=num_open,
            step_s=engine.step_cost.base_s,
            prefill_tokens_per_s=engine.rates.prefill_tokens_per_s,
            link_bytes_per_s=dict(engine.rates.link_bytes_per_s),
            prefilled_tokens=engine.metrics.prefilled_tokens,
            prompt_step_s=engine.metrics.prompt_step_s,
            freed_blocks=engine.metrics.freed_blocks,
            queue=queue,
            token_s=engine.context_cost.base,
            pair_s=engine.context_cost.slope,
        )


def _with(
    queue: tuple[Queued, ...], left: int, num_tokens: int, sign: int = 1
) -> tuple[Queued, ...]:
    """A queue with a prompt of `num_tokens` more, the last `left` of which are to be computed.

    Or without it, where `sign` is -1.
    """
    number = size_class(left)
    queue += (Queued(0, 0, 0),) * (number + 1 - len(queue))
    pairs = num_pairs(num_tokens - left, num_tokens)
    was = queue[number]
    now = Queued(was[0] + sign, was[1] + sign * left, was[2] + sign * pairs)
    return (*queue[:number], now, *queue[number + 1 :])
