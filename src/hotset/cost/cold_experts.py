"""Whether an expert that is not on the device is copied there or computed where it is: arithmetic.

The link and the CPU work at the same time, so that some experts are copied while the CPU computes
the others; what that gains has to pay for a step that the host takes part in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hotset.cost.experts import bring_experts
from hotset.cost.points import Point, seconds_at
from hotset.cost.routing import Routing

# Steps of more tokens are never slowed by a host that takes part in them: each cold expert has
# several rows then, and the link serves all of them with one copy.
MOST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class ColdCost:
    """What cold experts cost, as measured at start.

    Attributes:
        copy_s: seconds to copy one expert to the device.
        cpu_s: seconds that the CPU takes for one expert, all threads busy, by its rows; ascending.
        layer_s: what a layer of a step costs more if the host takes part in it.
    """

    copy_s: float
    cpu_s: tuple[Point, ...]
    layer_s: float

    def cpu_seconds(self, rows: float) -> float:
        """Seconds for an expert with `rows` rows, as `seconds_at`; one point stands for all."""
        points = self.cpu_s
        return points[0][1] if len(points) == 1 else seconds_at(points, rows)

    def num_copied(self, rows: Sequence[int]) -> int:
        """How many of the cold experts are copied, the others computed, to be done soonest.

        Args:
            rows: of each cold expert, descending: copies serve those with most rows.
        """
        left_s = sum(self.cpu_seconds(count) for count in rows)
        best, best_s = 0, left_s
        for number, count in enumerate(rows, 1):
            left_s -= self.cpu_seconds(count)
            seconds = max(number * self.copy_s, left_s)
            if seconds < best_s:
                best, best_s = number, seconds
        return best

    def seconds(self, rows: Sequence[int]) -> float:
        """Seconds of a layer's cold experts, some copied and the others computed."""
        copied = self.num_copied(rows)
        return max(copied * self.copy_s, sum(self.cpu_seconds(count) for count in rows[copied:]))

    def pays(self, num_tokens: int, *, top_k: int, num_experts: int, num_slots: int) -> bool:
        """Whether steps of `num_tokens` tokens are faster by a tenth or more if the CPU takes part.

        As routing is not known yet, tokens are expected to choose among the experts alike. As many
        of those that they need are cold as slots are short.
        """
        needed = Routing().distinct(num_experts, top_k, num_tokens)
        cold = round(needed * (1 - num_slots / num_experts))
        if num_tokens > MOST_TOKENS or cold == 0:
            return False
        rows = [max(1, round(num_tokens * top_k / needed))] * cold
        brought = bring_experts(
            missed=cold,
            absent=num_experts - num_slots,
            gather_s=self.copy_s,
            stream_s=self.copy_s,
            hidden_s=0.0,
            plan="cache",
            cpu_s=self.seconds(rows) + self.layer_s,
        )
        return brought.plan == "cpu"
