"""Linear layers of 8-bit weights with a scale for each output, and for each input row."""

import torch
from torch import nn

from hotset.linear.fp8 import FP8, FP8_MAX, to_fp8
from hotset.linear.reads import is_replaceable

_MULTIPLE = 16  # of both sizes of a weight, for the product
_PIECE_VALUES = 2**20
_ALL = slice(None)
_LEAST_SCALE = 1e-12  # of a row of zeros
_ROUTER_NAMES = ("gate", "router", "layer")  # as architectures with experts name theirs


def row_scales(values: torch.Tensor) -> torch.Tensor:
    """`[..., in]` of any float dtype to `[..., 1]` float32, which the largest of a row fits."""
    largest = values.abs().amax(dim=-1, keepdim=True).float()
    return (largest / FP8_MAX).clamp(min=_LEAST_SCALE)


class Fp8Linear(nn.Module):
    """What `nn.Linear` computes, from 8-bit weights and inputs, accumulated in float32.

    The weights are rounded once, with a scale for each row; the inputs in each step, with a scale
    for each token. Output and bias have the dtype of the input, bfloat16 on a GPU.

    Args:
        in_features: a multiple of 16.
        out_features: likewise.
        bias_dtype: None is no bias.
        device: of the weights, whose values are not set.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias_dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features, dtype=FP8, device=device)
        scale = torch.empty(out_features, 1, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", None)
        if bias_dtype is not None:
            bias = torch.empty(out_features, dtype=bias_dtype, device=device)
            self.bias = nn.Parameter(bias, requires_grad=False)

    @torch.no_grad()
    def set_rows(self, rows: slice, weight: torch.Tensor, columns: slice = _ALL) -> None:
        """Round `[rows, in]` weights of any float dtype on this layer's device into their place.

        In pieces, as float32 copies of a whole weight would take four times its bytes. Where the
        layer has some `columns` of a weight only, rows are scaled as the whole ones are.
        """
        num_rows = max(1, _PIECE_VALUES // weight.shape[1])
        places = zip(
            self.weight[rows].split(num_rows), self.scale[rows].split(num_rows), strict=True
        )
        for (to, to_scale), piece in zip(places, weight.split(num_rows), strict=True):
            scale = row_scales(piece)
            to_scale.copy_(scale)
            to.copy_(to_fp8(piece, scale)[:, columns])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        rows = x.reshape(-1, self.in_features)
        scale = row_scales(rows)
        if x.device.type == "cpu":  # before PyTorch 2.13 it has no product with scales of rows
            products = to_fp8(rows, scale).float() @ self.weight.float().t()
            out = (products * scale * self.scale.t()).to(x.dtype)
        else:
            out = torch._scaled_mm(
                to_fp8(rows, scale),
                self.weight.t(),
                scale_a=scale,
                scale_b=self.scale.t(),
                out_dtype=x.dtype,
                use_fast_accum=True,
            )
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)


def can_be_fp8(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of `model`, by name, that 8-bit weights can stand in for.

    Not the one that makes logits, where an error shows most, nor routers, which are tiny and whose
    choices are all or nothing, nor layers that the model reads itself (see `linear.reads`), nor
    sizes that the product does not know.
    """
    get_output = getattr(model, "get_output_embeddings", lambda: None)
    output = get_output()
    return {
        name: layer
        for name, layer in model.named_modules()
        if is_replaceable(layer)
        and layer is not output
        and name.rpartition(".")[2] not in _ROUTER_NAMES
        and layer.in_features % _MULTIPLE == 0
        and layer.out_features % _MULTIPLE == 0
    }


@torch.no_grad()
def quantize_linears(model: nn.Module) -> None:
    """Replace linear layers by 8-bit ones, in place, one at a time; on `meta`, without values.

    Which ones: see `can_be_fp8`.
    """
    for name, linear in can_be_fp8(model).items():
        parent, _, child = name.rpartition(".")
        quantized = Fp8Linear(
            linear.in_features,
            linear.out_features,
            bias_dtype=None if linear.bias is None else linear.bias.dtype,
            device=linear.weight.device,
        )
        if not linear.weight.is_meta:
            quantized.set_rows(slice(None), linear.weight)
        if linear.bias is not None and quantized.bias is not None:
            quantized.bias.copy_(linear.bias)
        setattr(model.get_submodule(parent), child, quantized)
