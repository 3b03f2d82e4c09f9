"""Who runs in a step, and how many tokens of each. Touches no tensor."""

from bisect import insort
from collections.abc import Sequence

from hotset.memory.kv_cache import KVCache
from hotset.request import FinishReason, Request, RequestStatus, StepItem, StepPlan

# Requests at the head of the queue whose blocks are brought from disk into host memory early.
_STAGE_AHEAD = 8


class Scheduler:
    """Continuous batching with chunked prefill under one token budget.

    A decode is a prefill of one token. Requests run in `Request.order`; when blocks run out the
    last one in that order is preempted: its blocks go down a tier and it waits again. A request
    is in `waiting`, in `running`, forked off by a running one later (`_forks`), or finished.
    """

    def __init__(
        self,
        kv: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_mixed_prefill_tokens: int,
    ) -> None:
        self.kv = kv
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_mixed_prefill_tokens = max_mixed_prefill_tokens
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._forks: dict[str, list[Request]] = {}  # id of the first of n -> the others

    @property
    def has_requests(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting or self.running)

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
        items: list[StepItem] = []
        budget = self.max_num_batched_tokens
        # A long prefill beside decodes would stall them, and have all that start together end
        # together, so that later steps have nothing but decodes (Sarathi-Serve, section 4).
        prefill_budget = self.max_mixed_prefill_tokens if self._has_decode() else budget
        was_preempted = False
        queued_tokens = 0
        for request in list(self.running):
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted below, for an earlier one
            if request.is_complete:
                continue  # its last token is being chosen
            self.kv.advance(request)
            num_tokens = self._share(request, budget, prefill_budget)
            if num_tokens > 0:
                reserved = self.kv.reserve(request, num_tokens)
                # Blocks that only a spill still holds come free by themselves: wait for those.
                while not reserved and self.kv.num_blocks_after_spills == 0:
                    was_preempted = True
                    if self._preempt_last() is request:
                        break
                    reserved = self.kv.reserve(request, num_tokens)
                if reserved:
                    items.append(StepItem(request, request.num_computed_tokens, num_tokens))
                    budget -= num_tokens
                    prefill_budget -= num_tokens if num_tokens > 1 else 0
            queued_tokens += request.num_tokens - request.num_computed_tokens
        # Requests are planned in order and the last is preempted first: no victim is planned.
        assert all(item.request.status is RequestStatus.RUNNING for item in items)
        while self.waiting and budget > 0 and not was_preempted:
            request = self.waiting[0]
            if len(self.running) >= self.max_num_seqs or not self.kv.admit(
                request, spare_blocks=len(self.running), queued_tokens=queued_tokens
            ):
                break
            self.waiting.pop(0)
            request.status = RequestStatus.RUNNING
            insort(self.running, request, key=_order)
            num_tokens = self._share(request, budget, prefill_budget)
            if num_tokens > 0 and self.kv.reserve(request, num_tokens):
                items.append(StepItem(request, request.num_computed_tokens, num_tokens))
                budget -= num_tokens
                prefill_budget -= num_tokens if num_tokens > 1 else 0
            queued_tokens += request.num_tokens - request.num_computed_tokens
        for request in self.waiting[:_STAGE_AHEAD]:
            self.kv.stage(request)
        return StepPlan(items, self.kv.take_copies())

    def commit(self, plan: StepPlan) -> None:
        """The plan's tokens were computed; to be called before their successors are appended."""
        for item in plan.items:
            if item.request.is_finished:
                continue  # while the step ran
            self.kv.commit(item.request, item.num_tokens)
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
            self.add(siblings)
        self.kv.release(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.error = error

    def _has_decode(self) -> bool:
        return any(
            request.num_tokens - request.num_computed_tokens == 1 and not request.is_complete
            for request in self.running
        )

    def _share(self, request: Request, budget: int, prefill_budget: int) -> int:
        """How many tokens of a request the step can take."""
        num_tokens = self.kv.num_runnable_tokens(request)
        return min(num_tokens, budget, prefill_budget if num_tokens > 1 else budget)

    def _fork(self, first: Request) -> None:
        for sibling in self._forks.pop(first.request_id):
            if len(self.running) < self.max_num_seqs:
                self.kv.fork(first, sibling)
                sibling.status = RequestStatus.RUNNING
                insort(self.running, sibling, key=_order)
            else:
                insort(self.waiting, sibling, key=_order)

    def _preempt_last(self) -> Request:
        victim = self.running.pop()
        self.kv.preempt(victim)
        victim.status = RequestStatus.WAITING
        insort(self.waiting, victim, key=_order)
        return victim


def _order(request: Request) -> tuple[int, float]:
    return request.order
