"""Linear layers whose weights stay in few bits on a GPU, as the checkpoint has them.

Few rows are multiplied with weights that are widened in registers; for many rows the weight is
widened once, into memory of the step, and PyTorch computes the product. The former multiplies sums
by scales of large groups, so that no weight is rounded; the latter widens to the nearest number.

With inputs in 8 bits (`WeightFormat.input_bits`) no weight is widened: few rows are multiplied by a
kernel of ours, and many by PyTorch's.
"""

import logging

import torch
from torch import nn
from torch.nn import functional

from hotset.cost.tuning import TUNINGS
from hotset.linear import scaled_mm
from hotset.linear.eight_bit import reference_product
from hotset.linear.narrow_matrix import NarrowMatrix, Planes
from hotset.weight_format import WeightFormat

_CHECK_SHAPE = (384, 512)
_CHECK_ROWS = (3, 48)
_MOST_ERROR = 1e-2  # of the norm; rounding to 16 bits gives a third of it

_matrices: dict[str, NarrowMatrix] = {}  # by key: operations of the compiler take strings
_scaled: set[WeightFormat] = set()  # whose products by PyTorch were tried, and are right

_log = logging.getLogger(__name__)


def quant_matrix(form: WeightFormat, shape: tuple[int, int]) -> NarrowMatrix:
    """The layout of a weight, for `quant_product`; ValueError as `NarrowMatrix.of` says."""
    matrix = NarrowMatrix.of(form, shape)
    return _matrices.setdefault(key_of(matrix), matrix)


def key_of(matrix: NarrowMatrix) -> str:
    """What `quant_product` knows a layout by."""
    return f"{matrix.form} {matrix.shape}"


class QuantLinear(nn.Module):
    """What `nn.Linear` computes, from a weight in few bits.

    Args:
        matrix: how the weight lies in memory, as `quant_matrix` gives it.
        bias_dtype: None is no bias.
        device: of the weight, whose values are not set.
    """

    bias: nn.Parameter | None

    def __init__(
        self, matrix: NarrowMatrix, *, bias_dtype: torch.dtype | None, device: torch.device
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.matrix, self._key = matrix, key_of(matrix)
        payload = torch.empty(matrix.end, dtype=torch.uint8, device=device)
        self.payload = nn.Parameter(payload, requires_grad=False)
        self.register_parameter("bias", None)
        if bias_dtype is not None:
            bias = torch.empty(self.out_features, dtype=bias_dtype, device=device)
            self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """`[out, in]` float32, in memory of its own."""
        return self.matrix.widened(self.payload, torch.float32)

    def set_rows(self, rows: slice, planes: Planes) -> None:
        """Put planes of some rows into their place; they begin and end with a group."""
        _set_rows(self.matrix, self.payload, rows, planes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        rows = x.reshape(-1, self.in_features)
        out: torch.Tensor = quant_product(rows, self.payload, self._key)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)


class QuantEmbedding(nn.Module):
    """What `nn.Embedding` computes, from a table in few bits whose groups are of rows.

    Attributes:
        matrix: how the table lies in memory.
        payload: the table, which the layer that makes logits may share.
        dtype: of the output.
    """

    def __init__(self, matrix: NarrowMatrix, dtype: torch.dtype, *, device: torch.device) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype
        payload = torch.empty(matrix.end, dtype=torch.uint8, device=device)
        self.payload = nn.Parameter(payload, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """`[tokens, width]`, in memory of its own."""
        return self.matrix.widened(self.payload, self.dtype)

    def set_rows(self, rows: slice, planes: Planes) -> None:
        """As `QuantLinear.set_rows`."""
        _set_rows(self.matrix, self.payload, rows, planes)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[...]` ids to `[..., width]`."""
        ids = token_ids.reshape(-1)
        codes, scales, more = self.matrix.views(self.payload)
        rows = codes[ids], scales[ids], None if more is None else more[ids]
        return self.matrix.widen(rows, self.dtype).view(*token_ids.shape, -1)


@torch.no_grad()
def _set_rows(matrix: NarrowMatrix, payload: torch.Tensor, rows: slice, planes: Planes) -> None:
    """Put planes of some rows into their place; they begin and end with a group."""
    num_rows = matrix.shape[0]
    first = rows.start or 0
    last = num_rows if rows.stop is None else rows.stop
    group = matrix.form.rows or num_rows
    for view, plane in zip(matrix.views(payload), planes, strict=True):
        if view is None or plane is None:
            continue
        if view.ndim == 1 and matrix.form.code == "table4":  # one table of all rows
            view.copy_(plane)
        elif len(view) == num_rows:
            view[first:last].copy_(plane)
        else:
            view[first // group : -(-last // group)].copy_(plane)


@torch.library.custom_op("hotset::quant_product", mutates_args=())
def quant_product(x: torch.Tensor, payload: torch.Tensor, matrix: str) -> torch.Tensor:
    """The product of `[T, K]` with a weight in few bits, as one operation for the compiler.

    Args:
        x: bfloat16 or float16.
        payload: of the weight.
        matrix: its layout, by `key_of`.

    Returns:
        `[T, N]`, dtype of `x`. The number of rows chooses the kernel.
    """
    layout = _matrices[matrix]
    if x.device.type == "cpu":
        return _on_cpu(x, payload, layout)
    if layout.form.input_bits == 8:
        return _rounded_product(x.contiguous(), payload, layout)
    from hotset.kernels.narrow_linear import narrow_linear, widen_matrix  # needs Triton

    if len(x) <= TUNINGS[x.device.type].narrow_rows:
        return narrow_linear(x.contiguous(), payload, layout)
    return functional.linear(x, widen_matrix(payload, layout, x.dtype))


def _on_cpu(x: torch.Tensor, payload: torch.Tensor, layout: NarrowMatrix) -> torch.Tensor:
    if layout.form.input_bits == 8:
        return reference_product(x, payload, layout).to(x.dtype)
    return functional.linear(x, layout.widened(payload, x.dtype))


def _rounded_product(x: torch.Tensor, payload: torch.Tensor, layout: NarrowMatrix) -> torch.Tensor:
    from hotset.kernels.eight_bit import round_rows
    from hotset.kernels.narrow_linear import narrow_linear

    is_many = len(x) >= TUNINGS[x.device.type].scaled_rows
    if is_many and layout.form in _scaled and scaled_mm.takes(layout, x.dtype):
        return scaled_mm.scaled_product(*round_rows(x, layout.form.columns), payload, layout)
    return narrow_linear(x, payload, layout)


@quant_product.register_fake
def _(x: torch.Tensor, payload: torch.Tensor, matrix: str) -> torch.Tensor:
    return x.new_empty(len(x), _matrices[matrix].shape[0])


@torch.inference_mode()
def check(form: WeightFormat, dtype: torch.dtype, device: torch.device) -> str | None:
    """Have the kernels multiply random weights, and compare; what is wrong, or None.

    Whatever a compiler that is missing makes Triton raise is what is wrong, too.
    """
    matrix = quant_matrix(form, _CHECK_SHAPE)
    generator = torch.Generator().manual_seed(0)
    payload = random_payload(matrix, generator).to(device)
    tuning = TUNINGS["cuda"]
    if scaled_mm.takes(matrix, dtype) and device.type == "cuda":
        _scaled.add(form)
        if (problem := _try(matrix, payload, dtype, 2 * tuning.scaled_rows)) is not None:
            _log.warning("PyTorch's %s here; other kernels take their place", problem)
            _scaled.remove(form)
    for num_rows in (*_CHECK_ROWS, 2 * tuning.narrow_rows):
        if (problem := _try(matrix, payload, dtype, num_rows)) is not None:
            return problem
    return None


def _try(
    matrix: NarrowMatrix, payload: torch.Tensor, dtype: torch.dtype, num_rows: int
) -> str | None:
    """What is wrong with a product of `num_rows` random rows, or None."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, matrix.shape[1], generator=generator).to(payload.device, dtype)
    expected = reference_product(x, payload, matrix)
    try:
        found = quant_product(x, payload, key_of(matrix)).float()
        wrong_by = float((found - expected).norm() / expected.norm())
    except Exception as error:  # whatever a compiler raises
        return f"products fail with {type(error).__name__}: {error}".splitlines()[0]
    is_right = wrong_by <= _MOST_ERROR
    return None if is_right else f"products of {num_rows} rows are wrong by {wrong_by:.1%}"


def widened_bytes(model: nn.Module) -> int:
    """Bytes of the largest weight in few bits, widened to 16 bits for a product of many rows."""
    layers = (
        module
        for module in model.modules()
        if isinstance(module, QuantLinear) and module.matrix.form.input_bits == 16
    )
    return max((2 * layer.in_features * layer.out_features for layer in layers), default=0)


def random_payload(matrix: NarrowMatrix, generator: torch.Generator) -> torch.Tensor:
    """`[end]` uint8 on the CPU: random bits, all of them numbers."""
    payload = torch.zeros(matrix.end, dtype=torch.uint8)
    codes, scales, more = matrix.views(payload)
    codes.random_(0, 256, generator=generator)
    if matrix.form.code == "e4m3":
        codes.masked_fill_(codes & 127 == 127, 56)
    if matrix.form.scale == "e8m0":
        scales.random_(117, 125, generator=generator)
    else:
        scales.copy_(torch.rand(scales.shape, generator=generator) * 0.02 + 1e-3)
    if more is not None and (matrix.form.has_zeros or more.dtype == torch.int8):
        more.random_(0, 16, generator=generator)
    elif more is not None and matrix.form.code == "table4":
        more.copy_(torch.linspace(-1, 1, len(more)))
    elif more is not None:
        more.copy_(torch.rand(more.shape, generator=generator) + 0.5)
    return payload
