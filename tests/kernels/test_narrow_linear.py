"""Linear layers in few bits, in Triton's interpreter where there is no GPU."""

import pytest
import torch

from hotset.kernels.narrow_linear import narrow_linear, widen_matrix
from hotset.linear.quant_linear import quant_matrix, random_payload
from hotset.weight_format import AWQ_128, FP8_BLOCK, FP8_ROW, INT4_128, MXFP4, NVFP4, WeightFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies the bits of bfloat16 as integers.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
GGUF = {
    "Q4_0": WeightFormat("int4", "float16", 1, 32),
    "Q4_1": WeightFormat("int4", "float16", 1, 32, has_minimum=True),
    "Q8_0": WeightFormat("int8", "float16", 1, 32),
    "Q4_K": WeightFormat("int4", "float16", 1, 32, span=256, has_minimum=True),
    "Q5_K": WeightFormat("int8", "float16", 1, 32, span=256, has_minimum=True),
    "Q6_K": WeightFormat("int8", "float16", 1, 16, span=256),
}
FORMS = [
    FP8_ROW,
    FP8_BLOCK,
    MXFP4,
    NVFP4,
    INT4_128,
    AWQ_128,
    WeightFormat("int4", "float16", 1, 32, has_zeros=True),
    *GGUF.values(),
    WeightFormat("table4", "float32", 1, 64),
    WeightFormat("int8", "bfloat16", 1, None),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name} {form.scale}")
@pytest.mark.parametrize("shape", [(96, 256), (200, 320)])  # the latter ends within blocks
def test_both_ways_have_the_weights_of_the_reference(
    form: WeightFormat, shape: tuple[int, int]
) -> None:
    if form.span is not None:
        shape = shape[0], shape[1] // form.span * form.span
    matrix = quant_matrix(form, shape)
    payload = random_payload(matrix, torch.Generator().manual_seed(0)).to(DEVICE)
    expected = matrix.widened(payload, DTYPE)
    assert torch.equal(widen_matrix(payload, matrix, DTYPE), expected)
    for num_rows in (1, 21):
        x = torch.randn(num_rows, shape[1], device=DEVICE).to(DTYPE)
        product = narrow_linear(x, payload, matrix)
        torch.testing.assert_close(product, x @ expected.t(), rtol=1e-2, atol=1e-2)
    assert narrow_linear(x[:0], payload, matrix).shape == (0, shape[0])
