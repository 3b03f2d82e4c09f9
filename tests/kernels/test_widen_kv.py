"""8-bit KV in 16 bits, in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.attention.flashinfer.widened import WidenedKV  # noqa: E402
from hotset.cost.cache_spec import KeysValues  # noqa: E402
from hotset.kernels.widen_kv import widen_kv  # noqa: E402
from hotset.linear.fp8 import FP8  # noqa: E402
from hotset.memory.arena import DeviceArena  # noqa: E402


@pytest.mark.parametrize(("size", "num_heads", "head_dim"), [(4, 2, 24), (16, 8, 128), (1, 1, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_are_converted_exactly_and_nothing_else_is_touched(
    size: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    shape = (2, size, num_heads, head_dim)
    num_blocks, num_layers = 6, 3
    row = 2 * size * num_heads * head_dim
    bits = torch.randint(0, 256, (num_blocks, num_layers * row), dtype=torch.uint8, device=DEVICE)
    bits[bits % 128 == 127] = 0x7E  # NaN would not equal itself: the largest instead
    bits[4, row] = 0x7E
    storage = bits.view(FP8)
    cache = storage[:, row : 2 * row].view(num_blocks, *shape)  # a strided view of the pool
    target = torch.full((5, *shape), 7.0, dtype=dtype, device=DEVICE)
    block_ids = torch.tensor([4, 0, -1, 4, -1], dtype=torch.int32, device=DEVICE)

    widen_kv(cache, block_ids, target)

    for place, block in enumerate(block_ids.tolist()):
        expected = cache[block].to(dtype) if block >= 0 else torch.full_like(target[0], 7.0)
        assert torch.equal(target[place], expected)
    assert float(target.float().max()) == 448


def test_layers_of_different_sizes_share_the_memory() -> None:
    layers = [KeysValues(2, 16, 16), KeysValues(1, 8, 8)]
    arena = DeviceArena(layers, num_blocks=9, block_size=4, dtype=FP8, device=torch.device(DEVICE))
    arena.storage.view(torch.uint8).copy_(torch.arange(9).unsqueeze(1))
    num_bytes = 5 * 2 * 4 * 2 * 16 * 2  # 5 of the larger
    widened = WidenedKV(arena, torch.bfloat16, num_bytes=num_bytes)
    assert widened.num_blocks == len(widened.places) == 5

    for block_ids in ([8, 2, 2, 7, 1], [3, 6], []):
        widened.plan(torch.tensor(block_ids, dtype=torch.int32, device=DEVICE))
        places = widened.places[: len(block_ids)].long()
        for layer, shape in enumerate(layers):
            both = widened.widen(layer)
            for got, cache in zip(both, arena.layers[layer].unbind(1), strict=True):
                assert got.shape == (5, 4, shape.num_kv_heads, shape.key_dim)
                assert torch.equal(got[places], cache[block_ids].to(torch.bfloat16))
