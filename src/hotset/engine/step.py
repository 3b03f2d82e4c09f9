"""What the scheduler chose for one step. Imports no torch."""

from dataclasses import dataclass, field

from hotset.kv.seats import SeatUpdates
from hotset.sequence import Kind, Request


@dataclass(frozen=True, slots=True)
class StepItem:
    """Tokens `[start, start + num_tokens)` of one request, to be computed in this step."""

    request: Request
    start: int
    num_tokens: int
    kind: Kind

    @classmethod
    def of(cls, request: Request, start: int, num_tokens: int) -> "StepItem":
        """An item of tokens of the prompt and the output, none of them proposed by a draft."""
        return cls(request, start, num_tokens, Kind.PROMPT if num_tokens > 1 else Kind.DECODE)

    @property
    def samples(self) -> bool:
        """Whether the item reaches the request's last token, so that a next one is chosen."""
        return self.start + self.num_tokens == self.request.num_tokens

    @property
    def scored(self) -> range:
        """Positions of the tokens whose logits tell a log-probability of the prompt, yet to take.

        That is of the token at the next position.
        """
        request = self.request
        if request.num_scored_tokens is None:
            return range(0)
        start = max(self.start, request.num_scored_tokens)
        return range(start, max(start, min(self.start + self.num_tokens, request.prompt_len - 1)))


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes, and what must be done before it.

    Attributes:
        items: in the order of those that run.
        copies: (from, to), blocks of the device.
        seats: of hot requests, to be written to the device's tables; None for nothing.
    """

    items: list[StepItem] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    seats: SeatUpdates | None = None
