"""Linear layers of a float32 model on the CPU, through oneDNN with packed weights.

PyTorch gives float32 products to MKL, which on AMD processors leaves half of AVX-512 unused.
Measured on one Zen 5 core, 576 x 1536 weights read from memory, 16 rows: 456 us, and 155 us here;
256 rows: 4139 us and 1799 us; the 576 x 49152 logits of 16 rows: 19.4 ms and 5.7 ms.
`torch.compile` uses the same operations when it freezes weights.
"""

import logging

import torch
from torch import nn

from hotset.cgroups import available_host_bytes
from hotset.linear.reads import is_replaceable

# Any number of rows runs; this is what the layout is chosen for. 256 measured the same.
_PACKED_FOR_ROWS = 16
# Packing takes a few times a weight's memory meanwhile: 4.3 times, measured for the logits'. For
# small weights that memory is not checked.
_PACKING_COPIES = 5
_LARGE_BYTES = 64 * 2**20

_log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """What `nn.Linear` computes, from a packed copy of its weight; the weight is not kept.

    It has what model code reads of a linear layer, but `weight` is made at each reading: layers
    that are known to be read are left as they are, see `linear.reads`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), _PACKED_FOR_ROWS
        )
        self._bias = None if linear.bias is None else linear.bias.detach()
        self.num_bytes = sum(p.nbytes for p in linear.parameters())

    def dense_weight(self) -> torch.Tensor:
        """The `[out, in]` weight as it was, in memory of its own."""
        weight: torch.Tensor = self._weight.to_dense()
        return weight

    @property
    def weight(self) -> torch.Tensor:
        """As `dense_weight`."""
        return self.dense_weight()

    @property
    def bias(self) -> torch.Tensor | None:
        """`[out]`, or None."""
        return self._bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return out


def pack_linears(model: nn.Module) -> None:
    """Replace the float32 linear layers of a model on the CPU, in place, one at a time.

    Does nothing without oneDNN, on other devices and for other dtypes, and leaves layers whose
    weight the model reads itself. A weight that is shared with the embedding is copied, as the
    embedding needs it as it is. A large weight for whose packing memory is short stays as it is.
    """
    if not torch.backends.mkldnn.is_available():
        return
    with torch.inference_mode():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if not is_replaceable(child) or not is_packable(child.weight):
                    continue
                if _has_room(child.weight):
                    setattr(parent, name, PackedLinear(child))
                else:
                    _log.warning("memory is short for packing %s: its products are slower", name)


def _has_room(weight: torch.Tensor) -> bool:
    is_small = weight.nbytes < _LARGE_BYTES
    return is_small or available_host_bytes() > _PACKING_COPIES * weight.nbytes


def is_packable(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a product of it."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32
