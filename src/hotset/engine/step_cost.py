"""How long a step takes by the tokens of prompts in it, followed while it runs.

Imports no torch.
"""

from collections.abc import Iterable

from hotset.engine.recent_line import RecentLine

_SMOOTHING = 0.1  # weight of the newest step
# Steps whose numbers of tokens differ by less than this say little of what a token takes.
_LEAST_SPREAD = 32.0
# Chunks are multiples of this, so that products have few sizes.
_MULTIPLE = 32
# Likewise of a token by those before it: steps of long prompts come in rows.
_CONTEXT_SMOOTHING, _CONTEXT_SPREAD = 0.02, 2048.0


class StepCost:
    """A line through recent steps: `base_s`, and `token_s` for each token of a prompt.

    Args:
        trials: tokens of prompts and seconds, of steps at the start; two or more sizes.
    """

    def __init__(self, trials: Iterable[tuple[int, float]]) -> None:
        self._line = RecentLine(trials, smoothing=_SMOOTHING, least_spread=_LEAST_SPREAD)

    @property
    def token_s(self) -> float:
        """Seconds that a token of a prompt adds to a step."""
        return self._line.slope

    @property
    def base_s(self) -> float:
        """Seconds of a step without prompts."""
        return self._line.base

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Follow with a step that had `num_tokens` of prompts."""
        self._line.observe(num_tokens, seconds)

    def most_tokens(self, seconds: float, *, least: int) -> int:
        """Tokens of prompts that take no longer than this: a multiple of 32, and `least` or more.

        They may take as long as the rest of the step in any case, so that prompts get half of the
        time where it is all that slow.
        """
        if self.token_s <= 0.0:
            return 2**31
        most = max(seconds, self.base_s) / self.token_s
        return max(least, int(most) // _MULTIPLE * _MULTIPLE)


def context_cost() -> RecentLine:
    """Seconds per token of a prompt, by the number of tokens before it: these are attended to."""
    return RecentLine((), smoothing=_CONTEXT_SMOOTHING, least_spread=_CONTEXT_SPREAD)
