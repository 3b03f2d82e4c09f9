"""When a split of memory between experts and KV follows the load: rarely, and for good reason."""

import math
from dataclasses import dataclass

from hotset.cost.expert_split import Split, Splitter
from hotset.cost.expert_steps import Load

# Time in which an observation of the load loses 63 % of its weight.
_SMOOTH_S = 10.0
# Seconds between two solutions of the split; seconds in which each solution has to be better than
# the present split; and by which part.
_SOLVE_S = 3.0
_HOLD_S = 6.0
_LEAST_GAIN = 0.1


@dataclass(frozen=True, slots=True)
class Move:
    """A split that is better than another for a load."""

    load: Load
    old: Split
    new: Split


class SplitPolicy:
    """Smooths what is observed of the load, and says when another split is worth a move.

    Args:
        splitter: solves for a load.
        load: expected before anything was observed.
    """

    def __init__(self, splitter: Splitter, load: Load) -> None:
        self._splitter = splitter
        self.load = load
        self._observed_s: float | None = None
        self._solve_from_s = -math.inf
        self._direction = 0  # 1 for more slots, -1 for fewer
        self._since_s = 0.0

    def observe(self, now_s: float, load: Load) -> None:
        """Take in how many requests there are at `now_s`, and what they are like."""
        before_s, self._observed_s = self._observed_s, now_s
        if before_s is None:
            return  # how long it has been like that is not known
        seconds = min(now_s - before_s, _SOLVE_S)  # without requests nothing was seen
        part = 1 - math.exp(-seconds / _SMOOTH_S)
        old = self.load

        def mixed(one: float, other: float) -> float:
            # By their logarithms: a short crowd changes little.
            return float(one * (other / one) ** part)

        self.load = Load(
            mixed(old.users, load.users),
            mixed(old.prompt_tokens, load.prompt_tokens),
            mixed(old.output_tokens, load.output_tokens),
        )

    def choose(self, now_s: float, num_slots: int) -> Move | None:
        """The split to move to from that of `num_slots`; None is to stay."""
        if now_s < self._solve_from_s:
            return None
        self._solve_from_s = now_s + _SOLVE_S
        old, new = self._splitter.solve(self.load, num_slots), self._splitter.solve(self.load)
        assert old is not None and new is not None
        direction = 0
        if self._gain(old, new) > _LEAST_GAIN:
            direction = 1 if new.num_slots > num_slots else -1
        if direction != self._direction:
            self._direction, self._since_s = direction, now_s
        if direction == 0 or now_s - self._since_s < _HOLD_S:
            return None
        self._direction = 0
        return Move(self.load, old, new)

    def _gain(self, old: Split, new: Split) -> float:
        """By which part `new` serves more of the load, or, of the target latency, is faster."""
        if self._splitter.target == "throughput":
            return new.served.output_tokens_per_s / old.served.output_tokens_per_s - 1
        if new.served.at_once > old.served.at_once:
            return new.served.at_once / old.served.at_once - 1
        return old.served.decode_step.seconds / new.served.decode_step.seconds - 1
