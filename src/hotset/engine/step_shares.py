"""How the requests that run share the tokens of one step. Imports no torch."""

from collections.abc import Mapping, Sequence

from hotset.engine.step import StepItem
from hotset.engine.urgency import PromptOrder
from hotset.kv.cache import KVCache
from hotset.sequence import Kind, Request, RequestStatus

# The oldest prompt gets a quarter of what a step has for prompts, rounded up, and so does the one
# that lacks the fewest tokens: neither waits for the others. What is left goes by urgency.
_SURE_PART = 4


class StepShares:
    """The tokens of the step being planned, by request, and what is left of its budgets.

    Where prompts begin alike, one of them computes what they share, and gets the shares of those
    that wait for it.

    Args:
        order: which prompts go first.
        running: the requests that run; the list may change while the step is planned.
        budget: most tokens of the step.
        prompt_budget: most tokens of prompts in it.
        scored_budget: most tokens of prompts whose log-probabilities are wanted.
    """

    def __init__(
        self,
        kv: KVCache,
        order: PromptOrder,
        running: Sequence[Request],
        *,
        budget: int,
        prompt_budget: int,
        scored_budget: int,
    ) -> None:
        self._order = order
        self._tables, self._prefixes = kv.tables, kv.prefixes
        self._grid = 0 if kv.states is None else kv.states.slots.grid
        self._budget = budget
        self._prompt_budget = prompt_budget
        self._scored_budget = scored_budget
        self._sure = -(-prompt_budget // _SURE_PART)
        self._shares: dict[Request, int] = {}
        self._running = running
        self._prompts: list[Request] = []  # requests with more than one token to compute
        self._oldest: Request | None = None
        self._urgent: list[Request] = []  # prompts, the most urgent first
        # Key of a block -> who computes it, in this step or the last ones. None: not looked yet.
        self._leaders: dict[bytes, Request] | None = None

    def plan_next(self, request: Request) -> bool:
        """Give a request that decodes its token, or the oldest prompt what is sure to it.

        Requests come in their order, the oldest first. False: there are no blocks for it.
        """
        num_tokens = self._tables.num_runnable_tokens(request)
        if num_tokens <= 1:
            most = self._budget if request.is_scored else min(self._budget, self._scored_budget)
            return self._plan(request, min(num_tokens, most))
        self.add_prompt(request)
        if self._oldest is not None or self._leader(request) is not None:
            return True  # when the rest is shared out
        if not self._plan_prompt(request, min(self._sure, self._budget)):
            return False
        self._oldest = request
        return True

    def add_prompt(self, request: Request) -> None:
        """Have a request with more than one token to compute take part in `share_out`."""
        if request not in self._prompts[-1:]:  # planned again after others were preempted
            self._prompts.append(request)

    def share_out(self) -> None:
        """Give what is left for prompts to those that run, as far as there are blocks."""
        prompts = [one for one in self._prompts if one.status is RequestStatus.RUNNING]
        if not prompts:
            return
        left = {request: self._tables.num_lacking_tokens(request) for request in prompts}
        shortest = sorted(prompts, key=lambda request: (request.priority, left[request]))
        if self._oldest is None:
            self.plan_next(prompts[0])
        self._give(shortest, left, self._sure)
        self._urgent = self._order.most_urgent_first(prompts, left)
        self._give(self._urgent, left, self._prompt_budget)

    def trim(self, row_tile: int) -> None:
        """Take the tokens off the step that are beyond a multiple of `row_tile`.

        They are of the least urgent prompts, and of what is sure to the oldest last, and at most
        half of all tokens of prompts; their blocks stay reserved.
        """
        num_tokens = sum(self._shares.values())
        num_prompt_tokens = sum(share for share in self._shares.values() if share > 1)
        excess = num_tokens % row_tile
        if num_tokens < row_tile or 2 * excess > num_prompt_tokens:
            return
        least_urgent_first = self._urgent[::-1]
        for keeps_sure in (True, False):
            for request in least_urgent_first:
                kept = self._sure if keeps_sure and request is self._oldest else 0
                cut = min(excess, max(0, self._shares.get(request, 0) - kept))
                if self._grid:
                    cut -= cut % self._grid
                if cut:
                    excess -= cut
                    self._shares[request] -= cut
                    self._prompt_budget += cut

    def take_items(self) -> list[StepItem]:
        """The step, in the order of those that run; prompts are charged for it."""
        items = [
            StepItem.of(request, request.kv.num_computed_tokens, self._shares[request])
            for request in self._running
            if self._shares.get(request)
        ]
        for request in self._urgent:
            self._order.charge(request, self._shares.get(request, 0))
        # Requests are planned in order and the last is preempted first: no victim is planned.
        assert len(items) == sum(share > 0 for share in self._shares.values())
        return items

    def _give(self, order: Sequence[Request], left: Mapping[Request, int], most: int) -> None:
        """Give up to `most` tokens to prompts in this order, each as many as it can take."""
        end = self._prompt_budget - most
        for request in order:
            room = min(self._prompt_budget - end, self._budget)
            if room <= 0:
                return
            leader = self._leader(request)
            if leader is None:
                self._plan_prompt(request, room)
            else:
                self._plan_prompt(leader, min(room, left[request]))

    def _leader(self, request: Request) -> Request | None:
        """Who computes the tokens that the request lacks next; None: itself."""
        if request in self._shares or self._grid:  # a state is no use before it is kept
            return None
        if self._leaders is None:
            self._leaders = self._find_leaders()
        if not self._leaders:
            return None
        key = self._prefixes.next_key(request)
        leader = None if key is None else self._leaders.get(key)
        if leader is request or leader is None or leader.status is not RequestStatus.RUNNING:
            return None
        return leader

    def _find_leaders(self) -> dict[bytes, Request]:
        """Requests that have computed a part of a block, by its key."""
        leaders = {}
        for request in self._running:
            if request.kind is Kind.PROMPT:
                key = self._prefixes.key_within(request)
                if key is not None:
                    leaders[key] = request
        return leaders

    def _plan_prompt(self, request: Request, most: int) -> bool:
        had = self._shares.get(request, 0)
        num_tokens = min(self._tables.num_runnable_tokens(request) - had, most, self._prompt_budget)
        if not request.is_scored:
            num_tokens = min(num_tokens, self._scored_budget)
        if self._grid:
            num_tokens = self._to_grid(request, had, num_tokens)
        if num_tokens <= 0:
            return True
        if not self._plan(request, num_tokens):
            return False
        self._prompt_budget -= num_tokens
        reached = self._prefixes.keys_reached_by(request, had + num_tokens)
        if self._leaders is None:
            self._leaders = self._find_leaders()
        self._leaders.update(dict.fromkeys(reached, request))
        return True

    def _to_grid(self, request: Request, had: int, num_tokens: int) -> int:
        """Fewer tokens where a part of a prompt would else end off the grid of states.

        So what is computed does not depend on where prompts are cut. Off the grid all the same
        where not one line of it would be reached.
        """
        end = request.kv.num_computed_tokens + had + num_tokens
        beyond = end % self._grid
        if end == request.num_tokens or beyond >= num_tokens:
            return num_tokens
        return num_tokens - beyond

    def _plan(self, request: Request, num_tokens: int) -> bool:
        """Reserve blocks for `num_tokens` more and add them; False where there are no blocks."""
        if num_tokens <= 0:
            return True
        had = self._shares.get(request, 0)
        if not self._tables.reserve(request, had + num_tokens):
            return False
        self._shares[request] = had + num_tokens
        self._budget -= num_tokens
        if not request.is_scored:
            self._scored_budget -= num_tokens
        return True
