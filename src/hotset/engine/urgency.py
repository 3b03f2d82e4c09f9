"""The order in which prompts are computed: each waits in proportion to its length.

Imports no torch.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from hotset.sequence import Request

# A prompt is due once its tenant was served this many times its length since it came. So equal
# ones go in order of arrival, a much shorter one overtakes, and a long one gets its turn.
# Source: Bender et al., "Flow and Stretch Metrics for Scheduling Continuous Job Streams" (SODA
# 1998): by earliest deadline, a deadline being a multiple of the job's own time.
SLACK = 8
# A prompt overtakes one that has no room yet if that one is this many times as long.
MUCH_LONGER = 4


class PromptOrder:
    """When each prompt is due, by the tokens of prompts that its tenant was served.

    A tenant that comes back is lifted to the least served of those that wait, so that idle time
    earns no credit; as `FairQueue`, which decides who comes here.
    """

    def __init__(self) -> None:
        self._served: defaultdict[str, int] = defaultdict(int)
        self._last_served = 0

    def enter(self, request: Request, others: Sequence[Request]) -> None:
        """Take in a request that comes to the end of the queue; `others` are in the engine."""
        tenant = request.tenant
        if not any(other.tenant == tenant and not other.num_output_tokens for other in others):
            waiting = {other.tenant for other in others if not other.num_output_tokens}
            least = min((self._served[other] for other in waiting), default=self._last_served)
            self._served[tenant] = max(self._served[tenant], least)
        request.queue.served_tokens = self._served[tenant]

    def charge(self, request: Request, num_tokens: int) -> None:
        """Count tokens of a prompt that are computed."""
        self._served[request.tenant] += num_tokens
        self._last_served = self._served[request.tenant]

    def most_urgent_first(
        self, prompts: Sequence[Request], left: Mapping[Request, int]
    ) -> list[Request]:
        """Prompts by priority, then by when each is due; equal ones stay in their order.

        The prompts of a tenant count one after the other, each by the tokens of all up to it: a
        tenant that sends many at once delays its own prompts only.

        Args:
            prompts: requests whose prompts are not computed yet.
            left: tokens that each of them lacks.
        """

        def due(request: Request) -> tuple[int, int]:
            return request.priority, request.queue.served_tokens + SLACK * left[request]

        in_turn = sorted(prompts, key=due)
        so_far: defaultdict[str, int] = defaultdict(int)
        due_together: dict[Request, tuple[int, int]] = {}
        for request in in_turn:
            tenant = request.tenant
            so_far[tenant] += left[request]
            due_together[request] = request.priority, self._served[tenant] + SLACK * so_far[tenant]
        return sorted(in_turn, key=due_together.__getitem__)
