"""Scores of an indexer drawn at random, with a known overlap from step to step: for benchmarks."""

import torch
import triton
import triton.language as tl

_TILE = 512
_PROGRAMS = 2048  # of a launch, about


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """A number that depends on each bit of a `uint32`: Wellons, "Hash Function Prospector"."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _normal(key):  # type: ignore[no-untyped-def]
    """A normal number for each `uint32` (Box and Muller, 1958)."""
    one = _mix(key)
    other = _mix(one + 0x1E3779B9)
    share = ((one >> 8).to(tl.float32) + 1.0) / 16777216.0
    turn = (other >> 8).to(tl.float32) / 16777216.0
    return tl.sqrt(-2.0 * tl.log(share)) * tl.cos(6.283185307179586 * turn)


@triton.jit(do_not_specialize=["layer", "count", "width"])  # type: ignore[untyped-decorator]
def _draw(  # type: ignore[no-untyped-def]
    scores,
    lengths,
    seeds,
    layer,
    count,
    width,
    stays,
    noise,
    guess,
    error,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_GUESS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + token)
    if length > count:  # else all are selected, whatever their scores
        # Vectors throughout: products of numbers wrap around, which only those of vectors may.
        zeros = tl.zeros([TILE], tl.uint32)
        key = _mix(_mix(zeros + tl.load(seeds + token).to(tl.uint32)) + layer.to(tl.uint32))
        seen = length + 1 if IS_GUESS else length
        step = _mix(key + seen.to(tl.uint32))
        wrong = _mix(step + 1)
        for tile in range(tl.program_id(1), tl.cdiv(length, TILE), SPLITS):
            place = tile * TILE + tl.arange(0, TILE)
            at = place.to(tl.uint32)
            score = stays * _normal(key ^ _mix(at)) + noise * _normal(step ^ _mix(at))
            if IS_GUESS:
                score = guess * score + error * _normal(wrong ^ _mix(at))
            score = tl.where(score == 0.0, 0.0, score)  # no negative zero: selection compares bits
            tl.store(scores + token * width + place, score, mask=place < length)


def draw_scores(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    *,
    layer: int,
    count: int,
    correlation: float,
    guess_correlation: float | None = None,
) -> None:
    """Overwrite scores by `sqrt(c) * a(seed, layer, position) + sqrt(1 - c) * noise(..., length)`.

    Both are normal, so selections overlap as `cost.selection` says. A score depends on the values
    named alone, not on the batch, and so is the same wherever a request's rows are. T tokens.

    Args:
        scores: `[T, N]` float32, contiguous, N at least each length. Mutated: of tokens that see
            more than `count`, the first `length` of a row. No score is a negative zero.
        lengths: `[T]` int32, tokens that each sees, with itself: its step.
        seeds: `[T]` int32, one per request.
        layer: any number of the layer, 0 or more.
        count: that are selected of each; fewer need no scores.
        correlation: c, of `hotset.cost.selection.correlation`.
        guess_correlation: of a guess of the scores with them, which is drawn in their place from
            the same numbers and as many others; `lengths` are then without the token itself. None
            draws the scores.

    Cost: some 60 integer operations per score; 4 bytes of HBM traffic.
    Reference: `hotset.attention.sparse.drawn.drawn_scores`, equal up to rounding.
    """
    num_tokens, width = scores.shape
    guess = 1.0 if guess_correlation is None else guess_correlation
    splits = triton.next_power_of_2(max(1, _PROGRAMS // num_tokens))
    splits = min(splits, triton.next_power_of_2(triton.cdiv(width, _TILE)))
    _draw[(num_tokens, splits)](
        scores,
        lengths,
        seeds,
        layer,
        count,
        width,
        correlation**0.5,
        (1 - correlation) ** 0.5,
        guess,
        (1 - guess**2) ** 0.5,
        TILE=_TILE,
        SPLITS=splits,
        IS_GUESS=guess_correlation is not None,
    )
