"""A token for each row of logits, drawn by its probability, in two launches.

Of a row whose largest logit is known they read the weights of its pieces, and one piece again.
"""

import torch
import triton
import triton.language as tl

# A token is found among pieces of the vocabulary of this size, then within one.
_PIECE = 128
_PIECES_A_PROGRAM = 32
_BELOW_ONE = tl.constexpr(1 - 2**-52)


@triton.jit
def _weights(logits, row, row_stride, vocab_size, columns, top, temperature):  # type: ignore[no-untyped-def]
    """Weights of tokens, relative to the likeliest; 0 beyond the vocabulary."""
    inside = columns < vocab_size
    found = tl.load(logits + row * row_stride + columns, mask=inside, other=float("-inf"))
    return tl.where(inside, tl.exp((found.to(tl.float32) - top) / temperature), 0.0)


@triton.jit(do_not_specialize=["vocab_size", "num_pieces"])  # type: ignore[untyped-decorator]
def _add_pieces(  # type: ignore[no-untyped-def]
    logits,
    rows,
    tops,
    temperatures,
    sums,
    row_stride,
    vocab_size,
    num_pieces,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    draw = tl.program_id(0)
    row = tl.load(rows + draw)
    pieces = tl.program_id(1) * PIECES + tl.arange(0, PIECES)
    columns = pieces[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    top = tl.load(tops + row).to(tl.float32)
    temperature = tl.load(temperatures + draw)
    weights = _weights(logits, row, row_stride, vocab_size, columns, top, temperature)
    tl.store(sums + draw * num_pieces + pieces, tl.sum(weights, 1), mask=pieces < num_pieces)


@triton.jit(do_not_specialize=["vocab_size", "num_pieces"])  # type: ignore[untyped-decorator]
def _find(  # type: ignore[no-untyped-def]
    logits,
    rows,
    tops,
    temperatures,
    shares,
    sums,
    token_ids,
    row_stride,
    vocab_size,
    num_pieces,
    PIECE: tl.constexpr,
    MOST_PIECES: tl.constexpr,
):
    draw = tl.program_id(0)
    row = tl.load(rows + draw)
    pieces = tl.arange(0, MOST_PIECES)
    found = tl.load(sums + draw * num_pieces + pieces, mask=pieces < num_pieces, other=0.0)
    ends = tl.cumsum(found.to(tl.float64), 0)
    total = tl.sum(tl.where(pieces == num_pieces - 1, ends, 0.0))
    # A share just below 1 may be rounded up to all; no token is beyond that.
    aim = tl.minimum(tl.load(shares + draw) * total, total * _BELOW_ONE)
    piece = tl.minimum(tl.sum(((ends <= aim) & (pieces < num_pieces)).to(tl.int32)), num_pieces - 1)
    aim -= tl.sum(tl.where(pieces == piece - 1, ends, 0.0))
    places = tl.arange(0, PIECE)
    top = tl.load(tops + row).to(tl.float32)
    temperature = tl.load(temperatures + draw)
    columns = piece * PIECE + places
    weights = _weights(logits, row, row_stride, vocab_size, columns, top, temperature)
    within = tl.cumsum(weights.to(tl.float64), 0)
    # The piece's sum was made in another order: the aim may be a rounding error beyond it.
    aim = tl.minimum(aim, tl.sum(tl.where(places == PIECE - 1, within, 0.0)) * _BELOW_ONE)
    place = tl.sum((within <= aim).to(tl.int32))
    # NaN weights find no token at all; an id outside of the vocabulary would end the process.
    tl.store(token_ids + row, tl.minimum(piece * PIECE + place, vocab_size - 1).to(tl.int64))


def draw_tokens(
    logits: torch.Tensor,
    tops: torch.Tensor,
    rows: torch.Tensor,
    temperatures: torch.Tensor,
    shares: torch.Tensor,
    token_ids: torch.Tensor,
) -> None:
    """Draw a token for some rows, by inverting the cumulative distribution at one number.

    R = rows, V = vocabulary, N = draws. A row's token depends on that row, its temperature and
    its share alone. Never synchronises with the host.

    Args:
        logits: `[R, V]`, any float dtype, rows contiguous.
        tops: `[R]`, contiguous, the largest logit of each row.
        rows: `[N]` int64.
        temperatures: `[N]` float32, above 0.
        shares: `[N]` float64, at least 0 and below 1: of the sum of all weights, how much is
            before the token.
        token_ids: `[R]` int64. Entries of `rows` are set: to a token of weight above 0, or to any
            token where logits are NaN.

    Reference: `sampler._invert`, equal up to rounding (`tests/kernels/test_draw_tokens.py`).
    """
    assert logits.stride(1) == 1
    vocab_size, num_draws = logits.shape[1], len(rows)
    num_pieces = triton.cdiv(vocab_size, _PIECE)
    sums = torch.empty(num_draws, num_pieces, dtype=torch.float32, device=logits.device)
    row_stride = logits.stride(0)
    _add_pieces[(num_draws, triton.cdiv(num_pieces, _PIECES_A_PROGRAM))](
        logits,
        rows,
        tops,
        temperatures,
        sums,
        row_stride,
        vocab_size,
        num_pieces,
        PIECE=_PIECE,
        PIECES=_PIECES_A_PROGRAM,
    )
    _find[(num_draws,)](
        logits,
        rows,
        tops,
        temperatures,
        shares,
        sums,
        token_ids,
        row_stride,
        vocab_size,
        num_pieces,
        PIECE=_PIECE,
        MOST_PIECES=triton.next_power_of_2(num_pieces),
    )
