"""Selections that are drawn instead of computed, for benchmarks with random weights.

Random weights select almost anew in each step, and trained ones a third to a half alike. A
benchmark has the indexer do its work, and then replaces the scores by numbers of a known overlap.
"""

from dataclasses import dataclass

import torch

from hotset.cost.cache_spec import KEYS_ALONE
from hotset.cost.selection import GUESSED, correlation

_MASK = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """`kernels.draw_scores._mix`, of 32 bits in int64: no product below overflows."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def _normal(key: torch.Tensor) -> torch.Tensor:
    one = _mix(key)
    other = _mix((one + 0x1E3779B9) & _MASK)
    share = ((one >> 8).double() + 1) / 2**24
    turn = (other >> 8).double() / 2**24
    return (-2 * share.log()).sqrt() * (2 * torch.pi * turn).cos()


def drawn_scores(
    num_keys: int,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    *,
    layer: int,
    correlation: float,
    guess_correlation: float | None = None,
) -> torch.Tensor:
    """The reference of `kernels.draw_scores`: `[T, num_keys]` float32, of all positions.

    Args:
        num_keys: N.
        lengths: `[T]` integers, tokens that each sees, with itself.
        seeds: `[T]` integers, one per request.
        layer: any number of the layer, 0 or more.
        correlation: of the scores of one position in two steps.
        guess_correlation: of a guess of these scores with them, which is drawn in their place;
            `lengths` are then without the token itself. None draws the scores.
    """
    seen = lengths if guess_correlation is None else lengths + 1
    places = _mix(torch.arange(num_keys, device=lengths.device))
    key = _mix((_mix(seeds.long() & _MASK) + layer) & _MASK)
    step = _mix((key + seen.long()) & _MASK)
    stays = correlation**0.5 * _normal(key[:, None] ^ places)
    noise = (1 - correlation) ** 0.5 * _normal(step[:, None] ^ places)
    scores = (stays + noise).float()
    if guess_correlation is not None:
        error = _normal(_mix((step + 1) & _MASK)[:, None] ^ places).float()
        scores = guess_correlation * scores + (1 - guess_correlation**2) ** 0.5 * error
    return torch.add(scores, 0.0)  # no negative zero


def seeds_of(keys: torch.Tensor, first_blocks: torch.Tensor) -> torch.Tensor:
    """A seed per token that is the same in each of its request's steps: `[T]` int32.

    It is the bits of the index key of the request's first token, which stays on the device and
    follows from what was computed alone: not from where it lies, nor from other requests.

    Args:
        keys: `[num_blocks, block_size, D]` index keys of a layer, of 4 bytes or more each.
        first_blocks: `[T]` int32 or int64, the first block of each token's request.
    """
    # As bytes: not every indexing operation knows 8-bit floats.
    first_keys = keys[:, 0].view(torch.uint8).index_select(0, first_blocks & ~KEYS_ALONE)
    return first_keys.view(torch.int32)[:, 0].contiguous()


@dataclass(frozen=True, slots=True)
class DrawnSelection:
    """What replaces the scores of a benchmark's indexers.

    Attributes:
        count: K, tokens that a query selects.
        correlation: of the scores of one position in two steps.
        guess_correlation: of the scores of a layer with a guess of them.
    """

    count: int
    correlation: float
    guess_correlation: float

    @classmethod
    def of_overlap(
        cls, overlap: float, *, context: int, count: int, guessed: float = GUESSED
    ) -> "DrawnSelection":
        """Selections that overlap by `overlap`, of contexts of about this many tokens.

        A guess of a selection has `guessed` of it.
        """
        share = count / context
        drawn = (correlation(share, max(share, each)) for each in (overlap, guessed))
        return cls(count, *drawn)

    def replace(
        self,
        scores: torch.Tensor,
        lengths: torch.Tensor,
        seeds: torch.Tensor,
        layer: int,
        *,
        is_guess: bool = False,
    ) -> None:
        """Overwrite the scores of a layer, after they were computed; see `draw_scores`.

        Args:
            scores: `[T, N]` float32. Mutated.
            lengths: `[T]` int32.
            seeds: `[T]` int32; the same for a request in each step, layer and run.
            layer: its number.
            is_guess: whether they are a guess of the scores, of tokens before each alone.
        """
        guess_correlation = self.guess_correlation if is_guess else None
        if scores.is_cuda:
            from hotset.kernels.draw_scores import draw_scores

            draw_scores(
                scores,
                lengths,
                seeds,
                layer=layer,
                count=self.count,
                correlation=self.correlation,
                guess_correlation=guess_correlation,
            )
            return
        drawn = drawn_scores(
            scores.shape[1],
            lengths,
            seeds,
            layer=layer,
            correlation=self.correlation,
            guess_correlation=guess_correlation,
        )
        scores.copy_(drawn)
