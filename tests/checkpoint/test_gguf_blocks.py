"""Matrices of GGUF files in tiles have the values that `gguf.dequantize` gives, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from hotset.checkpoint.gguf_blocks import FORMS, planes_of, tiles_of, weight_format
from hotset.kernels.narrow_forms import can_read
from hotset.kernels.narrow_linear import narrow_linear, widen_matrix
from hotset.linear.quant_linear import QuantLinear, quant_matrix


def random_blocks(kind: GGMLQuantizationType, num_rows: int, num_columns: int) -> np.ndarray:
    """Any codes and factors; scales are finite, large, small and subnormal."""
    generator = np.random.default_rng(7)
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (num_rows, num_columns // size, num_bytes)
    blocks = generator.integers(0, 256, shape, dtype=np.uint8)
    scales = generator.normal(0, 0.05, (*shape[:2], 2)).astype(np.float16)
    scales[0] = 6e-8  # the smallest
    place = 208 if kind.name == "Q6_K" else 0
    num_scales = 2 if FORMS[kind.name].has_minimum else 1
    blocks[..., place : place + 2 * num_scales] = scales[..., :num_scales].copy().view(np.uint8)
    return blocks.reshape(num_rows, -1)


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_what_the_file_says_bit_for_bit(name: str) -> None:
    kind = GGMLQuantizationType[name]
    data = random_blocks(kind, 70, 512)  # the last tile is not full
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))

    tiles = tiles_of(data, kind, order)

    expected = torch.from_numpy(gguf.dequantize(data, kind))[order]
    assert torch.equal(tiles.rows(torch.arange(70)), expected)
    assert torch.equal(tiles.rows(torch.tensor([69, 3, 3])), expected[[69, 3, 3]])
    assert tiles.num_bytes == tiles.form.bits / 8 * 96 * 512  # with the rows that fill it


@pytest.mark.parametrize("name", FORMS)
def test_planes_of_a_gpu_hold_what_the_file_says_bit_for_bit(name: str) -> None:
    kind = GGMLQuantizationType[name]
    data = random_blocks(kind, 70, 512)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    form = weight_format(name)
    layer = QuantLinear(quant_matrix(form, (70, 512)), bias_dtype=None, device=torch.device("cpu"))

    layer.set_rows(slice(None), planes_of(data, kind, order))

    expected = torch.from_numpy(gguf.dequantize(data, kind))[order]
    assert can_read(form)
    assert torch.equal(layer.weight, expected)
    assert form.num_bytes((70, 512)) == FORMS[name].bits / 8 * 70 * 512
    for dtype in (torch.float32, torch.float16):
        widened = widen_matrix(layer.payload, layer.matrix, dtype)
        assert torch.equal(widened, expected.to(dtype))
    x = torch.randn(3, 512)
    product = narrow_linear(x, layer.payload, layer.matrix)
    torch.testing.assert_close(product, x @ expected.t(), rtol=1e-4, atol=1e-4)


def test_the_bits_of_forms_are_those_of_files_but_for_opened_codes() -> None:
    wider = {"Q5_K": 3, "Q6_K": 2, "IQ4_NL": 4, "IQ4_XS": 4}  # bits of a code that are not in use
    for name, form in FORMS.items():
        size, num_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        stored = 8 * num_bytes / size
        # Factors of 6 bits take a byte each.
        spare = 0.125 if name in ("Q4_K", "Q5_K") else 0.0625 if name == "IQ4_XS" else 0
        assert form.bits == stored + wider.get(name, 0) + spare, name
