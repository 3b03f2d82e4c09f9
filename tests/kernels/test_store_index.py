"""Index keys as 8-bit floats, in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.attention.sparse.rounded import store_keys, turn, turned_query, widen_keys  # noqa: E402
from hotset.attention.sparse.select import score_keys  # noqa: E402
from hotset.kernels.index_scores import PagedTokens, score_paged_keys  # noqa: E402
from hotset.kernels.store_index import store_index  # noqa: E402
from hotset.linear.fp8 import FP8  # noqa: E402

BLOCKS, SIZE = 6, 4
# Triton's interpreter multiplies no bfloat16.
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]


def make_cache(dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory of blocks, and in it the keys and scales of the second of three layers."""
    layer = SIZE * (dim + 4)
    memory = torch.zeros(BLOCKS, 3 * layer, dtype=torch.uint8, device=DEVICE)
    own = memory[:, layer : 2 * layer]
    keys = own[:, : SIZE * dim].view(FP8).view(BLOCKS, SIZE, dim)
    return memory, keys, own[:, SIZE * dim :].view(torch.float32)


def keys_that_round_to_themselves(num: int, dim: int) -> torch.Tensor:
    """Triton's interpreter does not round, so there these need not be: `[num, dim]` float32.

    Turned they are small whole numbers times a power of two, a different one for each.
    """
    whole = torch.randint(-15, 16, (num, dim)).float()
    return turn(whole) / dim * 2.0 ** torch.arange(-3, num - 3).unsqueeze(1)


@pytest.mark.parametrize(("num_heads", "dim"), [(1, 16), (8, 32), (64, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_are_written_where_they_belong_and_queries_are_turned(
    num_heads: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    num_tokens = 7
    memory, keys, scales = make_cache(dim)
    expected_memory, *expected = make_cache(dim)
    wide = torch.zeros(num_tokens, 2 * dim)  # as rows of a wider product may be
    wide[:, :dim] = keys_that_round_to_themselves(num_tokens, dim)
    key = wide.to(DEVICE, dtype)[:, :dim]
    query = torch.randint(-3, 4, (num_tokens, num_heads, dim), device=DEVICE).to(dtype)
    blocks = torch.tensor([4, 0, 0, 2, 4, 1, 3], device=DEVICE)
    offsets = torch.tensor([3, 0, 2, 1, 0, 3, 3], device=DEVICE)
    turned = torch.empty_like(query)

    store_index(query, key, turned, keys, scales, blocks, offsets)

    store_keys(key, *expected, (blocks, offsets))
    assert torch.equal(memory, expected_memory)
    assert torch.equal(turned, turned_query(query))


def test_the_scale_is_that_of_the_reference_at_its_edges() -> None:
    # One number of a key is turned into that number at each place.
    largest = [0.0, 1e-6, 1e-4, 448.0, 448.0001, 447.9, 7.0, 7.0001, 3e4]
    key = torch.zeros(len(largest), 16, device=DEVICE)
    key[:, 0] = torch.tensor(largest, device=DEVICE)
    blocks = torch.arange(len(largest), device=DEVICE) // SIZE
    offsets = torch.arange(len(largest), device=DEVICE) % SIZE
    _, keys, scales = make_cache(16)
    _, expected_keys, expected_scales = make_cache(16)
    query = torch.zeros(len(largest), 1, 16, device=DEVICE)

    store_index(query, key, torch.empty_like(query), keys, scales, blocks, offsets)

    store_keys(key, expected_keys, expected_scales, (blocks, offsets))
    assert torch.equal(scales, expected_scales)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 33, 2000])
def test_any_keys_are_rounded_as_the_reference_does_on_a_gpu(num_tokens: int) -> None:
    torch.manual_seed(0)
    memory = torch.zeros(500, SIZE * 132, dtype=torch.uint8, device=DEVICE)
    keys = memory[:, : SIZE * 128].view(FP8).view(500, SIZE, 128)
    scales = memory[:, SIZE * 128 :].view(torch.float32)
    places = torch.randperm(500 * SIZE, device=DEVICE)[:num_tokens]
    key = (torch.randn(num_tokens, 128, device=DEVICE) * 10).bfloat16()
    query = torch.randn(num_tokens, 64, 128, device=DEVICE).bfloat16()
    turned = torch.empty_like(query)

    store_index(query, key, turned, keys, scales, places // SIZE, places % SIZE)

    found = widen_keys(keys, scales, places // SIZE)
    found = found[torch.arange(num_tokens, device=DEVICE), places % SIZE]
    exact = turn(key)
    largest = exact.abs().amax(1, keepdim=True)
    assert bool((scales.flatten()[places].unsqueeze(1) * 448 >= largest * (1 - 1e-6)).all())
    # Half a step of 3 bits of mantissa, or of the smallest numbers.
    assert bool(((found - exact).abs() <= exact.abs() / 15.9 + largest * 2**-17).all())
    torch.testing.assert_close(turned.float(), turned_query(query).float(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("num_heads", "dim"), [(2, 16), (64, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_rounded_keys_are_those_of_the_reference(
    num_heads: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    _, keys, scales = make_cache(dim)
    places = torch.arange(BLOCKS * SIZE, device=DEVICE)
    key = torch.randn(len(places), dim, device=DEVICE) / 8
    store_keys(key, keys, scales, (places // SIZE, places % SIZE))
    values = (torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in ([5, 2, 3], [0], [11]))
    tokens = PagedTokens(*values)
    query = torch.randn(1, num_heads, dim, device=DEVICE).to(dtype)
    weights = torch.randn(1, num_heads, device=DEVICE)
    scores = torch.full((1, 16), 777.0, device=DEVICE)

    score_paged_keys(query, weights, keys, tokens, scores, count=1, key_scales=scales)

    blocks = torch.tensor([5, 2, 3], device=DEVICE)
    own = widen_keys(keys, scales, blocks).flatten(0, 1)[:11]
    expected = score_keys(query, weights, own)
    torch.testing.assert_close(scores[:, :11], expected, rtol=1e-5, atol=1e-3)
    assert (scores[:, 11:] == 777.0).all()
