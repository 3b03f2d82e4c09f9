"""Linear layers that read the same input, merged into one product."""

from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional

from hotset.cost.tuning import TUNINGS
from hotset.linear.fp8_linear import Fp8Linear
from hotset.linear.narrow import NarrowLinear
from hotset.linear.quant_linear import QuantLinear, quant_matrix
from hotset.linear.reads import is_replaceable
from hotset.linear.tiles import TILE_ROWS, join_tiles

Linear: TypeAlias = nn.Linear | Fp8Linear | NarrowLinear | QuantLinear

# Siblings that architectures of transformers apply to the same tensor.
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Product:
    """The product of a group's merged weight with the tensor its layers were last given."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.num_uses = 0
        self.x: torch.Tensor | None = None
        self.value: torch.Tensor | None = None


class MergedLinear(nn.Module):
    """One layer of a merged group: its columns of the product of all.

    The first layer that is given a tensor computes the product, the last one forgets it.

    Attributes:
        whole: the layer of all columns, shared by the group.
        columns: of `whole` that are this layer's.

    Args:
        apart_from_rows: rows from which all layers of the group compute their own columns; None is
            never.
    """

    def __init__(
        self, whole: Linear, columns: slice, product: _Product, *, apart_from_rows: int | None
    ) -> None:
        super().__init__()
        self.whole = whole
        self.columns = columns
        self._product = product
        self._apart_from_rows = apart_from_rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`, a view of the product, or a product of its own."""
        product = self._product
        if self._apart_from_rows is not None and x.shape[-2] >= self._apart_from_rows:
            bias = self.whole.bias
            return functional.linear(
                x, self.whole.weight[self.columns], None if bias is None else bias[self.columns]
            )
        if product.x is not x or product.value is None:
            product.x, product.num_uses = x, 0
            product.value = self.whole(x)
        value = product.value
        product.num_uses += 1
        if product.num_uses == product.num_layers:
            product.x, product.value, product.num_uses = None, None, 0
        return value[..., self.columns]


@torch.no_grad()
def merge_linears(model: nn.Module) -> None:
    """Replace sibling linear layers by parts of one, in place, one group at a time.

    A group whose layers are not plain, 8-bit or narrow linear layers of one kind is left alone, and
    so are those of `QuantLinear` that have values. The weights of one group at a time are in memory
    twice; none of a model on `meta`.
    """
    for parent in list(model.modules()):
        for names in _GROUPS:
            layers = [getattr(parent, name, None) for name in names]
            plain: list[Linear] = [layer for layer in layers if is_replaceable(layer)]
            fp8: list[Linear] = [layer for layer in layers if type(layer) is Fp8Linear]
            narrow: list[Linear] = [layer for layer in layers if type(layer) is NarrowLinear]
            quant: list[Linear] = [layer for layer in layers if type(layer) is QuantLinear]
            for linears in (plain, fp8, narrow, quant):
                if len(linears) == len(names) and _are_alike(linears):
                    _merge(parent, names, linears)


def _are_alike(layers: list[Linear]) -> bool:
    first = layers[0]
    return all(
        layer.in_features == first.in_features
        and _kind(layer) == _kind(first)
        and (layer.bias is None) == (first.bias is None)
        for layer in layers
    )


def _kind(layer: Linear) -> object:
    if isinstance(layer, QuantLinear):  # groups of rows end with a layer
        form = layer.matrix.form
        return (
            form if layer.payload.is_meta and not layer.out_features % (form.rows or 1) else layer
        )
    if not isinstance(layer, NarrowLinear):
        return layer.weight.dtype
    # A tile that is not full can be the last one only.
    return layer.tiles.form if layer.out_features % TILE_ROWS == 0 else layer


def _join(layers: list[Linear]) -> Linear:
    first = layers[0]
    narrow = [layer.tiles for layer in layers if isinstance(layer, NarrowLinear)]
    if narrow:
        biases = [layer.bias for layer in layers if layer.bias is not None]
        return NarrowLinear(join_tiles(narrow), torch.cat(biases) if biases else None)
    whole: Linear
    num_outputs = sum(layer.out_features for layer in layers)
    if isinstance(first, QuantLinear):
        matrix = quant_matrix(first.matrix.form, (num_outputs, first.in_features))
        bias_dtype = None if first.bias is None else first.bias.dtype
        return QuantLinear(matrix, bias_dtype=bias_dtype, device=torch.device("meta"))
    if isinstance(first, Fp8Linear):
        whole = Fp8Linear(
            first.in_features, num_outputs, bias_dtype=None, device=torch.device("meta")
        )
    else:
        whole = nn.Linear(first.in_features, num_outputs, bias=False, device="meta")
    for name in ("weight", "scale", "bias"):
        parts = [part for layer in layers if (part := getattr(layer, name, None)) is not None]
        if parts:
            whole.register_parameter(name, nn.Parameter(torch.cat(parts), requires_grad=False))
    return whole


def _merge(parent: nn.Module, names: tuple[str, ...], layers: list[Linear]) -> None:
    whole = _join(layers)
    product = _Product(len(layers))
    smallest = min(layer.out_features for layer in layers)
    tuning = TUNINGS["cuda"]  # on a CPU too, where no product is so large that it matters
    can_be_apart = isinstance(whole, nn.Linear) and smallest >= tuning.apart_columns
    apart_from_rows = tuning.apart_from_rows if can_be_apart else None
    start = 0
    for name, layer in zip(names, layers, strict=True):
        stop = start + layer.out_features
        part = MergedLinear(whole, slice(start, stop), product, apart_from_rows=apart_from_rows)
        setattr(parent, name, part)
        start = stop
