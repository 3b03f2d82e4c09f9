"""Prompts that wait for the state of another one that begins alike, and is being computed.

Imports no torch.
"""

from bisect import bisect_left, insort

from hotset.kv.prefix import Prefixes
from hotset.kv.state_slots import StateSlots
from hotset.sequence import Followed, Kind, Request

_FEWEST_TOKENS = 128


class Leaders:
    """Finds who computes what a request begins with, and has the state there kept for it.

    A request waits once at most, so that it comes to its turn whatever becomes of the other.

    Args:
        prefixes: names what requests begin with.
        slots: where the states are kept.

    Attributes:
        fewest_tokens: to be found beyond what a request has found: for fewer it does not wait.
    """

    def __init__(self, prefixes: Prefixes, slots: StateSlots) -> None:
        self._prefixes, self._slots = prefixes, slots
        self.fewest_tokens = _FEWEST_TOKENS
        self._leaders: dict[Request, None] = {}  # in the order in which they were let in

    def add(self, request: Request) -> None:
        """A request was let in."""
        self._leaders[request] = None

    def drop(self, request: Request) -> None:
        """A request does not run any more."""
        self._leaders.pop(request, None)

    def follow(self, request: Request, num_found: int) -> bool:
        """Have a request wait for a state, where there will be one far beyond what it has found.

        Args:
            request: that could be let in.
            num_found: tokens that it would go on from.

        Returns:
            Whether it waits.
        """
        if request.kv.followed is not None or not self._slots.can_give:
            return False
        self._leaders = dict.fromkeys(one for one in self._leaders if one.kind is Kind.PROMPT)
        keys = self._prefixes.findable(request)
        found = [self._offer(leader, request, keys) for leader in self._leaders]
        best = max(found, key=lambda one: one.position, default=None)
        if best is None or best.position - num_found < self.fewest_tokens:
            return False
        snapshots = best.leader.kv.snapshots
        if best.position not in snapshots:
            insort(snapshots, best.position)
        request.kv.followed = best
        return True

    def is_following(self, request: Request) -> bool:
        """Whether what a request waits for is still to be computed."""
        followed = request.kv.followed
        if followed is None or followed.leader not in self._leaders:
            return False
        return followed.leader.kv.num_computed_tokens < followed.position

    def _offer(self, leader: Request, request: Request, keys: list[bytes]) -> Followed:
        """The last place up to which both are alike where the leader can still keep its state."""
        own, kv = self._prefixes.extend(leader), leader.kv
        most = min(len(keys), len(own))
        is_another = leader.priority > request.priority or not most or keys[0] != own[0]
        if is_another:
            return Followed(leader, 0)
        num_alike = bisect_left(range(most), True, key=lambda i: keys[i] != own[i])
        position = num_alike * self._prefixes.block_size
        position -= position % self._slots.grid
        is_ahead = position > kv.num_computed_tokens + kv.num_planned
        will_keep = position in kv.snapshots and position > kv.num_computed_tokens
        return Followed(leader, position if is_ahead or will_keep else 0)
