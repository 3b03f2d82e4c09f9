"""Who runs in a step, and how many tokens of each. Touches no tensor. Imports no torch."""

from bisect import insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hotset.clock import REAL_CLOCK, Clock
from hotset.engine.step import Step
from hotset.engine.step_cost import StepCost
from hotset.engine.step_shares import StepShares
from hotset.engine.urgency import MUCH_LONGER, PromptOrder
from hotset.kv.cache import KVCache
from hotset.metrics import Metrics
from hotset.request import FinishReason
from hotset.sequence import Request, RequestStatus

# Requests at the head of the queue whose blocks are brought closer ahead of their turn.
_LOOK_AHEAD = 8
# A turn lasts at least as many times the time to fetch its KV back: rotation costs at most about
# the inverse in throughput, even where no copy runs beside compute.
_LEAST_TURN_FETCHES = 8

# However many requests decode, prompts get this part of `max_mixed_tokens`.
_LEAST_PREFILL_SHARE = 4
# Requests behind one without room that are looked at, whether they may overtake it.
_LOOK_BEHIND = 64
# Those that overtake a request without room have at most half of its tokens.
_OVERTAKING_PART = 2


class _Bound(NamedTuple):
    """How long the prompts in a step may take, and the tokens they get in any case."""

    seconds: float
    least_tokens: int


# Prompts alone hold up the requests that come next. On a CPU, chunks of 32, 64 and 128 tokens take
# 43, 17 and 6 % more time per token than chunks of 256.
_ALONE = _Bound(0.5, 128)
_BESIDE_DECODES = _Bound(0.25, 32)
# Bursts are for devices that take more tokens than beside decodes in less time than that.
_BURST = _Bound(0.1, 32)


class Scheduler:
    """Continuous batching with chunked prefill under one token budget.

    A decode is a prefill of one token. Requests run in `Request.order`; when blocks run out the
    last one in that order is preempted: its blocks go down a tier and it waits again. A request
    is in `waiting`, in `running`, forked off by a running one later (`_forks`), or finished.

    Args:
        max_scored_tokens: most tokens of a step that are of prompts whose log-probabilities are
            yet to take, as their logits take memory.
        bursts: whether prompts come first, in steps of up to `max_num_batched_tokens`, while more
            requests wait with room for all of them than there are that decode: decodes are the
            faster the more of them run together.
        row_tile: rows that a product computes together, so that a few more than a multiple of it
            take as long as the next multiple: while others wait, such a step leaves those tokens
            of prompts to the next one.
        rotation_s: None lets a request run to its end, first come, first served. Otherwise a
            request that has waited `rotation_s` for its first token preempts the running request
            with the longest quantum, if that has run `rotation_s` and produced a token; the latter
            queues up again behind all others. Only while host memory has room for its KV and some
            to spare, so that nothing is recomputed.
        ahead_tokens: a request is let in once it and all that run can grow by this many tokens, or
            to their ends: what was computed or fetched for it should not be lost to preemption a
            few steps later.
        users_at_once: of requests that run or wait, with a number of tokens on average, how many
            are to run at once, some of them hot if need be; None where none may turn hot.
        step_cost: how long steps take, so that prompts add a bounded time to one; None: no bound.
        clock: what quanta and waits are measured by.
    """

    def __init__(
        self,
        kv: KVCache,
        *,
        metrics: Metrics,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_mixed_tokens: int,
        max_scored_tokens: int = 2**31,
        bursts: bool = False,
        row_tile: int = 1,
        rotation_s: float | None = None,
        ahead_tokens: int = 256,
        users_at_once: Callable[[int, float], int] | None = None,
        step_cost: StepCost | None = None,
        clock: Clock = REAL_CLOCK,
    ) -> None:
        self.kv = kv
        self.metrics = metrics
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_mixed_tokens = max_mixed_tokens
        self.max_scored_tokens = max_scored_tokens
        self.bursts = bursts
        self.row_tile = row_tile
        self.rotation_s = rotation_s
        self.ahead_tokens = ahead_tokens
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._users_at_once = users_at_once
        self._step_cost = step_cost
        self._clock = clock
        self._order = PromptOrder()
        self._forks: dict[int, list[Request]] = {}  # sequence id of the first of n -> the others
        self._blocked: Request | None = None  # the first in the queue found no room
        self._num_overtaking = 0  # tokens of those that were let in past it

    @property
    def has_requests(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting or self.running)

    @property
    def num_tokens(self) -> int:
        """Of all requests that are not finished, computed or not."""
        forks = (one for others in self._forks.values() for one in others)
        return sum(one.num_tokens for one in (*self.waiting, *self.running, *forks))

    @property
    def num_blocks_ahead(self) -> int:
        """Blocks that running requests lack to grow as far as those let in are sure to."""
        return self._num_short(self.ahead_tokens)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue a request; further ones are its siblings and share its prompt's blocks."""
        first, *others = requests
        self._order.enter(first, self.waiting + self.running)
        for other in others:
            other.queue.served_tokens = first.queue.served_tokens
        insort(self.waiting, first, key=_order)
        if others:
            self._forks[first.sequence_id] = others
            first.kv.has_forks = True
        if len(self.waiting) + len(self.running) <= self.max_num_seqs:
            self.kv.asking.add(first)

    def schedule(self) -> Step:
        """Choose the tokens of the next step and reserve their blocks.

        The step is empty when no request can go on before a transfer has ended.
        """
        prompt_budget = self._prompt_budget()
        if self.rotation_s is not None:
            self._rotate(self.rotation_s)
        step = StepShares(
            self.kv,
            self._order,
            self.running,
            budget=self.max_num_batched_tokens,
            prompt_budget=prompt_budget,
            scored_budget=self.max_scored_tokens,
        )
        was_preempted = self._plan_running(step)
        if self.waiting and not was_preempted:
            self._admit_waiting(step)
        step.share_out()
        if self.waiting:
            step.trim(self.row_tile)
            spare_blocks = self._num_short(self.kv.block_size)
            self.kv.look_ahead(self.waiting[:_LOOK_AHEAD], spare_blocks=spare_blocks)
        items, hot = step.take_items(), self.kv.hot
        if self.kv.states is not None:
            for item in items:
                self.kv.states.plan(item.request, item.num_tokens)
        seats = hot.take_updates() if hot is not None and items else None
        return Step(items, self.kv.tables.take_copies(), seats)

    def commit(self, plan: Step) -> None:
        """The plan's tokens were computed; to be called before their successors are appended."""
        for item in plan.items:
            if item.request.is_finished:
                continue  # while the step ran
            self.kv.commit(item.request, item.num_tokens)
            if item.request.num_scored_tokens is not None:
                end = item.start + item.num_tokens
                item.request.num_scored_tokens = max(item.request.num_scored_tokens, end)
            if item.samples and item.request.sequence_id in self._forks:
                self._fork(item.request)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        error: str | None = None,
        *,
        keeps_kv: bool = True,
    ) -> None:
        """End a request in whatever state it is and free its blocks.

        Without `keeps_kv` no other request finds what it stored.
        """
        if request.is_finished:
            return
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:  # not forked off yet
            for others in self._forks.values():
                if request in others:
                    others.remove(request)
        siblings = self._forks.pop(request.sequence_id, [])
        if siblings:  # the first ended before its prompt was computed: the next takes over
            siblings[0].kv.num_cached_tokens = request.kv.num_cached_tokens
            siblings[0].kv.num_sibling_tokens = max(
                request.kv.high_water_tokens, request.kv.num_sibling_tokens
            )
            siblings[0].num_scored_tokens = None if request.num_scored_tokens is None else 0
            self.add(siblings)
        if keeps_kv:
            self.kv.release(request)
        else:
            self.kv.discard(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.error = error

    def step_failed(self, step: Step) -> None:
        """Take back what requests of a step that did not run to its end cannot go on with.

        Their KV is written again into the same places; a state may have gone on in some layers.
        """
        self.kv.forget_slots()
        if self.kv.states is None:
            return
        for item in step.items:
            if item.request.status is RequestStatus.RUNNING:
                self.running.remove(item.request)
                self._preempt(item.request, has_state=False)

    def _prompt_budget(self) -> int:
        """Most tokens of prompts in the next step."""
        num_decodes = self._num_decodes()
        if not num_decodes:
            return self._within(self.max_num_batched_tokens, _ALONE)
        # A long prefill beside decodes would stall them, and have all that start together end
        # together, so that later steps have nothing but decodes (Sarathi-Serve, section 4).
        room = self.max_mixed_tokens - num_decodes
        most = max(1, room, self.max_mixed_tokens // _LEAST_PREFILL_SHARE)
        most = self._within(most, _BESIDE_DECODES)
        if self._is_burst(num_decodes):
            most = max(most, self._within(self.max_num_batched_tokens, _BURST))
        return most

    def _within(self, most: int, bound: _Bound) -> int:
        if self._step_cost is None:
            return most
        return min(most, self._step_cost.most_tokens(bound.seconds, least=bound.least_tokens))

    def _num_decodes(self) -> int:
        return sum(
            request.num_uncomputed_tokens == 1 and not request.is_complete
            for request in self.running
        )

    def _is_burst(self, num_decodes: int) -> bool:
        """Whether more requests are yet to start than decode, and memory holds all of them."""
        if not self.bursts:
            return False
        num_starting = len(self.running) - num_decodes + len(self.waiting)
        if num_starting <= num_decodes or len(self.running) + len(self.waiting) > self.max_num_seqs:
            return False
        blocks = self.num_blocks_ahead + self.kv.tables.num_short(self.waiting, self.ahead_tokens)
        return blocks <= self.kv.tables.num_available

    def _plan_running(self, step: StepShares) -> bool:
        """Plan decodes and the oldest prompt, in order; returns whether one had to be preempted."""
        was_preempted = False
        for request in list(self.running):
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted below, for an earlier one
            if request.is_complete:
                continue  # its last token is being chosen
            if not self.kv.advance(request):
                self.running.remove(request)
                self._send_back(request)
                continue
            # Blocks that only a spill still holds come free by themselves: wait for those.
            while not step.plan_next(request) and self.kv.transfers.num_blocks_after_spills == 0:
                if self.kv.hot is not None and self.kv.hot.make_room(self.running, 1):
                    continue
                was_preempted = True
                if self._preempt_last() is request:
                    break
        return was_preempted

    def _admit_waiting(self, step: StepShares) -> None:
        """Let in those who have room, in order, even if this step takes none of their tokens.

        Their blocks in a slower tier come meanwhile. Past the first that has no room, those
        that are much shorter are let in, up to a part of its tokens: it has waited for longer.
        """
        queued_tokens = sum(r.num_uncomputed_tokens for r in self.running)
        was_blocked = self._blocked
        self._blocked = None
        num_behind = num_tried = 0  # of those after the first that has no room
        for request in list(self.waiting):
            if len(self.running) >= self.max_num_seqs or num_tried == _LOOK_AHEAD:
                self._blocked = self._blocked or request
                break
            blocked: Request | None = self._blocked
            if blocked is not None:
                num_behind += 1
                if num_behind > _LOOK_BEHIND:
                    break
                if not self._may_overtake(request, blocked):
                    continue
            if not self.kv.is_following(request) and self._admit(request, queued_tokens):
                self.waiting.remove(request)
                self._start_turn(request)
                if self.kv.tables.num_runnable_tokens(request) > 1:
                    step.add_prompt(request)
                else:
                    step.plan_next(request)
                queued_tokens += request.num_uncomputed_tokens
                if blocked is not None:
                    self._num_overtaking += request.num_tokens
            elif self.kv.is_following(request):
                continue  # others may have room
            elif blocked is None:
                self._blocked = request
                if request is not was_blocked:
                    self._num_overtaking = 0
            else:
                num_tried += 1

    def _may_overtake(self, request: Request, blocked: Request) -> bool:
        """Whether a request may be let in before one that came earlier and has no room."""
        if blocked.num_output_tokens or request.priority != blocked.priority:
            return False
        num_overtaking = self._num_overtaking + request.num_tokens
        return (
            MUCH_LONGER * request.num_tokens <= blocked.num_tokens
            and _OVERTAKING_PART * num_overtaking <= blocked.num_tokens
        )

    def _admit(self, request: Request, queued_tokens: int) -> bool:
        """Give a request blocks if there is room for it, and for it and all that run to grow.

        For the first in the queue others turn hot, where more are to run at once than do.
        """
        while not self._fits(request, queued_tokens):
            if self._blocked is not None or not self._turn_hot_for(request):
                return False
        return True

    def _fits(self, request: Request, queued_tokens: int) -> bool:
        spare_blocks = self._spare_for(request)
        if spare_blocks > self.kv.tables.num_available:
            return False  # without a look at what is known of it
        return self.kv.admit(request, spare_blocks=spare_blocks, queued_tokens=queued_tokens)

    def _spare_for(self, newcomer: Request) -> int:
        if not self.running:
            return 0
        return self.kv.tables.spare_for(newcomer, self.running, self.ahead_tokens)

    def _turn_hot_for(self, newcomer: Request) -> bool:
        """Have running requests give back the blocks that one lacks; whether any did."""
        if self.kv.hot is None or self._users_at_once is None:
            return False
        num_running = len(self.running)
        num_tokens = sum(one.num_tokens for one in self.running) + newcomer.num_tokens
        wanted, context = num_running + len(self.waiting), num_tokens / (num_running + 1)
        if num_running >= self._users_at_once(wanted, context):
            return False
        needed = self._spare_for(newcomer) + self.kv.num_blocks_missing(newcomer)
        return self.kv.hot.make_room(self.running, needed - self.kv.tables.num_available)

    def _num_short(self, more_tokens: int) -> int:
        """Blocks the running requests lack for the tokens they have and `more_tokens` more."""
        return self.kv.tables.num_short(self.running, more_tokens)

    def _start_turn(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        request.queue.quantum_start_s = self._clock.now()
        request.queue.quantum_start_tokens = request.num_tokens
        insort(self.running, request, key=_order)

    def _rotate(self, rotation_s: float) -> None:
        """For each request that has waited for its first token for long, end the oldest turn.

        So many as have tokens for one step, and not before the blocks of the last ones are free.
        """
        if self._blocked is None or self.kv.transfers.num_blocks_after_spills > 0:
            return
        now_s = self._clock.now()
        num_tokens = sum(r.num_uncomputed_tokens for r in self.running)
        for waiting in list(self.waiting):
            if num_tokens >= self.max_num_batched_tokens:
                return
            if waiting.num_output_tokens > 0 or now_s - waiting.queue.since_s < rotation_s:
                continue
            if self.kv.is_following(waiting):
                continue
            victim = self._oldest_turn(waiting, now_s, rotation_s)
            if victim is None or not self.kv.can_park(victim, self.running, 2 * self.ahead_tokens):
                return
            self.running.remove(victim)
            victim.queue.since_s = now_s
            self._preempt(victim)
            self.metrics.rotations += 1
            num_tokens += waiting.num_tokens

    def _oldest_turn(self, waiting: Request, now_s: float, rotation_s: float) -> Request | None:
        """Of the running requests that `waiting` may replace, the one that runs for longest."""
        turns = [
            request
            for request in self.running
            if request.priority >= waiting.priority
            and request.num_tokens > request.queue.quantum_start_tokens
            and not request.is_complete
            and now_s - request.queue.quantum_start_s
            >= max(rotation_s, _LEAST_TURN_FETCHES * self.kv.transfers.fetch_s(request.num_tokens))
        ]
        return min(turns, key=lambda request: request.queue.quantum_start_s, default=None)

    def _preempt_last(self) -> Request:
        victim = self.running.pop()
        self._preempt(victim)
        return victim

    def _preempt(self, victim: Request, *, has_state: bool = True) -> None:
        self.metrics.preemptions += 1
        victim.queue.num_preemptions += 1
        self._send_back(victim, has_state=has_state)

    def _send_back(self, victim: Request, *, has_state: bool = True) -> None:
        self.kv.preempt(victim, has_state=has_state)
        victim.status = RequestStatus.WAITING
        insort(self.waiting, victim, key=_order)

    def _fork(self, first: Request) -> None:
        for sibling in self._forks.pop(first.sequence_id):
            if len(self.running) < self.max_num_seqs and self.kv.can_fork(first):
                self.kv.fork(first, sibling)
                self._start_turn(sibling)
            else:
                sibling.kv.num_cached_tokens = first.kv.num_cached_tokens
                sibling.kv.num_sibling_tokens = sibling.prompt_len
                insort(self.waiting, sibling, key=_order)
        self.kv.end_fork(first)


def _order(request: Request) -> tuple[int, float]:
    return request.order
