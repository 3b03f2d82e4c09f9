"""Who runs in a step, and how many tokens of each. Touches no tensor."""

import time
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import replace

from hotset.memory.kv_cache import KVCache
from hotset.request import FinishReason, Request, RequestStatus, StepItem, StepPlan

# Requests at the head of the queue whose blocks are brought closer ahead of their turn.
_LOOK_AHEAD = 8
# A request is let in once it and all that run can grow by this much, or to their ends, with what
# those give back that end before: what was computed or fetched for it should not be lost to
# preemption a few steps later.
_AHEAD_TOKENS = 256
# A turn lasts at least as many times the time to fetch its KV back: rotation costs at most about
# the inverse in throughput, even where no copy runs beside compute.
_LEAST_TURN_FETCHES = 8

# However many requests decode, prompts get this part of `max_mixed_tokens`.
_LEAST_PREFILL_SHARE = 4


class _Step:
    """The step being planned, and what is left of its budgets."""

    def __init__(self, budget: int, prefill_budget: int) -> None:
        self.items: list[StepItem] = []
        self.budget = budget
        self.prefill_budget = prefill_budget
        self.scored_budget = budget  # of prompts whose log-probabilities are wanted
        self.computing: set[bytes] = set()  # keys of the blocks that prefills in it complete


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
        rotation_s: None lets a request run to its end, first come, first served. Otherwise each
            that has waited for its first token for so long makes one give way that has run for so
            long, and has a token to show for it; that one queues up again behind all others. Only
            while host memory has room for its KV and some to spare, so that nothing is recomputed.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        kv: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_mixed_tokens: int,
        max_scored_tokens: int = 2**31,
        bursts: bool = False,
        row_tile: int = 1,
        rotation_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kv = kv
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_mixed_tokens = max_mixed_tokens
        self.max_scored_tokens = max_scored_tokens
        self.bursts = bursts
        self.row_tile = row_tile
        self.rotation_s = rotation_s
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._clock = clock
        self._forks: dict[str, list[Request]] = {}  # id of the first of n -> the others
        self._blocked: Request | None = None  # the first in the queue found no room

    @property
    def has_requests(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting or self.running)

    @property
    def num_blocks_ahead(self) -> int:
        """Blocks that running requests lack to grow as far as those let in are sure to."""
        return self._blocks_short(_AHEAD_TOKENS)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue a request; further ones are its siblings and share its prompt's blocks."""
        first, *others = requests
        insort(self.waiting, first, key=_order)
        if others:
            self._forks[first.request_id] = others

    def schedule(self) -> StepPlan:
        """Choose the tokens of the next step and reserve their blocks.

        The plan is empty when nobody can go on before a transfer has ended.
        """
        budget = self.max_num_batched_tokens
        # A long prefill beside decodes would stall them, and have all that start together end
        # together, so that later steps have nothing but decodes (Sarathi-Serve, section 4).
        num_decodes = self._num_decodes()
        if num_decodes and not self._is_burst(num_decodes):
            room = self.max_mixed_tokens - num_decodes
            step = _Step(budget, max(1, room, self.max_mixed_tokens // _LEAST_PREFILL_SHARE))
        else:
            step = _Step(budget, budget)
        step.scored_budget = min(budget, self.max_scored_tokens)
        if self.rotation_s is not None:
            self._rotate(self.rotation_s)
        was_preempted = self._plan_running(step)
        if self.waiting and not was_preempted:
            self._admit_waiting(step)
        if self.waiting:
            self._trim(step.items)
            spare_blocks = self._blocks_short(self.kv.block_size)
            self.kv.look_ahead(self.waiting[:_LOOK_AHEAD], spare_blocks=spare_blocks)
        return StepPlan(step.items, self.kv.take_copies())

    def commit(self, plan: StepPlan) -> None:
        """The plan's tokens were computed; to be called before their successors are appended."""
        for item in plan.items:
            if item.request.is_finished:
                continue  # while the step ran
            self.kv.commit(item.request, item.num_tokens)
            if item.request.num_scored_tokens is not None:
                end = item.start + item.num_tokens
                item.request.num_scored_tokens = max(item.request.num_scored_tokens, end)
            if item.samples and item.request.request_id in self._forks:
                self._fork(item.request)

    def finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request in whatever state it is and free its blocks."""
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
        siblings = self._forks.pop(request.request_id, [])
        if siblings:  # the first ended before its prompt was computed: the next takes over
            siblings[0].num_cached_tokens = request.num_cached_tokens
            siblings[0].num_sibling_tokens = max(
                request.high_water_tokens, request.num_sibling_tokens
            )
            siblings[0].num_scored_tokens = None if request.num_scored_tokens is None else 0
            self.add(siblings)
        self.kv.release(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.error = error

    def _num_decodes(self) -> int:
        return sum(
            request.num_tokens - request.num_computed_tokens == 1 and not request.is_complete
            for request in self.running
        )

    def _is_burst(self, num_decodes: int) -> bool:
        """Whether more requests are yet to start than decode, and memory holds all of them."""
        if not self.bursts:
            return False
        num_starting = len(self.running) - num_decodes + len(self.waiting)
        if num_starting <= num_decodes or len(self.running) + len(self.waiting) > self.max_num_seqs:
            return False
        blocks = self._blocks_short(_AHEAD_TOKENS) + sum(
            self.kv.num_blocks_short(request, _AHEAD_TOKENS) for request in self.waiting
        )
        return blocks <= self.kv.pool.num_available

    def _plan_running(self, step: _Step) -> bool:
        """Plan the running requests, in order; returns whether one had to be preempted."""
        was_preempted = False
        for request in list(self.running):
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted below, for an earlier one
            if request.is_complete:
                continue  # its last token is being chosen
            self.kv.advance(request)
            num_tokens = self._share(request, step)
            # Blocks that only a spill still holds come free by themselves: wait for those.
            while (
                not self._plan(request, num_tokens, step) and self.kv.num_blocks_after_spills == 0
            ):
                was_preempted = True
                if self._preempt_last() is request:
                    break
        # Requests are planned in order and the last is preempted first: no victim is planned.
        assert all(item.request.status is RequestStatus.RUNNING for item in step.items)
        return was_preempted

    def _admit_waiting(self, step: _Step) -> None:
        """Let in those who have room, in order, even if this step takes none of their tokens.

        What of theirs is in a colder tier comes meanwhile.
        """
        queued_tokens = sum(r.num_tokens - r.num_computed_tokens for r in self.running)
        self._blocked = None
        while self.waiting:
            request = self.waiting[0]
            if len(self.running) >= self.max_num_seqs or not self._admit(request, queued_tokens):
                self._blocked = request
                break
            self.waiting.pop(0)
            self._start_turn(request)
            self._plan(request, self._share(request, step), step)
            queued_tokens += request.num_tokens - request.num_computed_tokens

    def _admit(self, request: Request, queued_tokens: int) -> bool:
        """Give a request blocks if there is room for it, and for it and all that run to grow."""
        spare_blocks = 0
        if self.running:
            all_grown = self._blocks_short(_AHEAD_TOKENS) + (
                self.kv.num_blocks_short(request, _AHEAD_TOKENS)
                - self.kv.num_blocks_short(request, 0)
            )
            spare_blocks = min(all_grown, self._peak_blocks_short(request))
            if spare_blocks > self.kv.pool.num_available:
                return False  # without a look at what is known of it
        return self.kv.admit(request, spare_blocks=spare_blocks, queued_tokens=queued_tokens)

    def _peak_blocks_short(self, newcomer: Request) -> int:
        """The most blocks that running requests and `newcomer` lack while each grows.

        By `_AHEAD_TOKENS`, or to their ends, where those that decode give back what nobody shares;
        what `newcomer` has so far is not counted. Source: Gong et al., "Past-Future Scheduler for
        LLM Serving under SLA Guarantees" (ASPLOS 2025), section 3, for known numbers of tokens.
        """
        size = self.kv.block_size
        # In tokens. Those that do not decode yet are taken to grow at once, and to stay.
        lacking = (newcomer.num_tokens - 1) % size + self._tokens_ahead(newcomer)
        given_back = 0
        decoding = []
        for request in self.running:
            # Of its last block it may use any part.
            lacks = request.num_tokens + size - 1 - size * len(request.block_table)
            if request.num_tokens - request.num_computed_tokens > 1:
                lacking += lacks + self._tokens_ahead(request)
                continue
            gives = size * (len(request.block_table) - request.num_shared_blocks)
            given_back += gives
            decoding.append((self._tokens_ahead(request), lacks, gives))
        most = lacking
        decoding.sort(reverse=True)
        for count, (ahead, lacks, gives) in enumerate(decoding, 1):
            # Just before this one ends, those before it in the list are still there.
            lacking += lacks
            given_back -= gives
            most = max(most, lacking + count * ahead - given_back)
        return -(-most // size)

    def _tokens_ahead(self, request: Request) -> int:
        return min(_AHEAD_TOKENS, request.max_total_tokens - request.num_tokens)

    def _blocks_short(self, more_tokens: int) -> int:
        """Blocks the running requests lack for the tokens they have and so many more."""
        return sum(self.kv.num_blocks_short(request, more_tokens) for request in self.running)

    def _start_turn(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        request.turn_start_s = self._clock()
        request.turn_start_tokens = request.num_tokens
        insort(self.running, request, key=_order)

    def _share(self, request: Request, step: _Step) -> int:
        """How many tokens of a request the step can take."""
        num_tokens = self.kv.num_runnable_tokens(request)
        if num_tokens <= 1:
            return min(num_tokens, step.budget)
        if step.computing and self.kv.next_key(request) in step.computing:
            return 0  # another request computes the same tokens; the next step takes them over
        return min(num_tokens, step.budget, step.prefill_budget)

    def _plan(self, request: Request, num_tokens: int, step: _Step) -> bool:
        """Reserve blocks for `num_tokens` and add them; False where there are no blocks."""
        if not request.is_scored:
            num_tokens = min(num_tokens, step.scored_budget)
        if num_tokens <= 0:
            return True
        if not self.kv.reserve(request, num_tokens):
            return False
        step.items.append(StepItem(request, request.num_computed_tokens, num_tokens))
        step.budget -= num_tokens
        if not request.is_scored:
            step.scored_budget -= num_tokens
        if num_tokens > 1:
            step.prefill_budget -= num_tokens
            step.computing.update(self.kv.keys_completed_by(request, num_tokens))
        return True

    def _trim(self, items: list[StepItem]) -> None:
        """Take the tokens off a step that are beyond a multiple of `row_tile`.

        They are of the last prompts in it, at most half of all tokens of prompts; their blocks
        stay reserved.
        """
        num_tokens = sum(item.num_tokens for item in items)
        num_prompt_tokens = sum(item.num_tokens for item in items if item.num_tokens > 1)
        excess = num_tokens % self.row_tile
        if num_tokens < self.row_tile or 2 * excess > num_prompt_tokens:
            return
        for index in range(len(items) - 1, -1, -1):
            item = items[index]
            if item.num_tokens > 1:
                cut = min(excess, item.num_tokens)
                items[index] = replace(item, num_tokens=item.num_tokens - cut)
                excess -= cut
        items[:] = [item for item in items if item.num_tokens > 0]

    def _rotate(self, rotation_s: float) -> None:
        """For each request that has waited for its first token for long, end the oldest turn.

        So many as have tokens for one step, and not before the blocks of the last ones are free.
        """
        if self._blocked is None or self.kv.num_blocks_after_spills > 0:
            return
        now_s = self._clock()
        num_tokens = sum(r.num_tokens - r.num_computed_tokens for r in self.running)
        for waiting in list(self.waiting):
            if num_tokens >= self.max_num_batched_tokens:
                return
            if waiting.num_output_tokens > 0 or now_s - waiting.queued_s < rotation_s:
                continue
            victim = self._oldest_turn(waiting, now_s, rotation_s)
            if victim is None or not self.kv.can_park(victim, self.running, 2 * _AHEAD_TOKENS):
                return
            self.running.remove(victim)
            victim.queued_s = now_s
            self._preempt(victim)
            self.kv.metrics.rotations += 1
            num_tokens += waiting.num_tokens

    def _oldest_turn(self, waiting: Request, now_s: float, rotation_s: float) -> Request | None:
        """Of the running requests that `waiting` may replace, the one that runs for longest."""
        turns = [
            request
            for request in self.running
            if request.priority >= waiting.priority
            and request.num_tokens > request.turn_start_tokens
            and not request.is_complete
            and now_s - request.turn_start_s
            >= max(rotation_s, _LEAST_TURN_FETCHES * self.kv.fetch_s(request))
        ]
        return min(turns, key=lambda request: request.turn_start_s, default=None)

    def _preempt_last(self) -> Request:
        victim = self.running.pop()
        self._preempt(victim)
        return victim

    def _preempt(self, victim: Request) -> None:
        self.kv.preempt(victim)
        victim.status = RequestStatus.WAITING
        insort(self.waiting, victim, key=_order)

    def _fork(self, first: Request) -> None:
        for sibling in self._forks.pop(first.request_id):
            if len(self.running) < self.max_num_seqs:
                self.kv.fork(first, sibling)
                self._start_turn(sibling)
            else:
                sibling.num_cached_tokens = first.num_cached_tokens
                sibling.num_sibling_tokens = sibling.prompt_len
                insort(self.waiting, sibling, key=_order)


def _order(request: Request) -> tuple[int, float]:
    return request.order
