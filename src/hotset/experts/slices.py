"""Experts cut along their middle: a rank has the same part of each, and outputs add up.

Every rank so reads, keeps and copies as many bytes, whatever experts a step needs.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hotset.errors import ConfigError, ModelError
from hotset.experts.narrow import NarrowLayout
from hotset.experts.weights import LayerExperts
from hotset.linear.narrow_matrix import NarrowMatrix, Planes
from hotset.parallel.group import current
from hotset.parallel.narrow_parts import can_cut, cut_planes, halved
from hotset.parallel.parts import Part


@dataclass(frozen=True, slots=True)
class ExpertSlice:
    """Which part of each expert of a layer a rank has, of matrices `[out, in]`.

    Attributes:
        up: rows of the first matrix, gate and up in one.
        half: rows of gate or up alone.
        down: columns of the second matrix.
    """

    up: Part
    half: Part
    down: Part

    @classmethod
    def of(cls, experts: LayerExperts, rank: int, size: int, name: str) -> "ExpertSlice":
        """The slice of one of `size` ranks; `experts` are whole, or in few bits and slices.

        Raises:
            ConfigError: the middle does not divide by `size`.
            ModelError: a norm follows the second product, so that parts do not add up.
        """
        if experts.has_post_norm:
            raise ModelError(f"the experts of {name} end in a norm, so their parts do not add up")
        layout = experts.layout
        middle = layout.down[0 if layout.is_transposed else 1]
        if experts.weights is None:
            middle *= size
        if middle % size:
            raise ConfigError(
                f"{current().layout} does not divide the {middle} columns of the experts of "
                f"{name}; give ep, which leaves them whole"
            )
        part = slice(rank * middle // size, (rank + 1) * middle // size)
        rows: tuple[slice, ...] = (part,)
        if experts.has_gate and experts.module.is_concatenated:
            rows = part, slice(middle + part.start, middle + part.stop)
        elif experts.has_gate:  # gate and up in turn
            rows = (slice(2 * part.start, 2 * part.stop),)
        return cls(Part(0, rows), Part(0, (part,)), Part(1, (part,)))

    def parts(self, matrix: NarrowMatrix, which: int) -> Part:
        """Of the up (0) or down (1) matrix in few bits, whose gate and up may be apart."""
        if which:
            return self.down
        return self.half if len(matrix.shape) == 3 else self.up

    def narrow(self, whole: NarrowLayout) -> NarrowLayout | None:
        """How slices of experts in few bits lie; None where they end within a group or a byte."""
        parts = [self.parts(matrix, which) for which, matrix in enumerate(whole.matrices)]
        lengths = [m.shape[p.dim - 2] for m, p in zip(whole.matrices, parts, strict=True)]
        cuts = list(zip(lengths, parts, strict=True))
        form = halved(whole.form, cuts)
        if not all(can_cut(form, length, part) for length, part in cuts):
            return None
        up, down = whole.matrices
        *others, _, inputs = up.shape
        return NarrowLayout(
            (*others, parts[0].length, inputs), (down.shape[0], self.down.length), form
        )

    def cut(self, whole: NarrowLayout, part: NarrowLayout, which: int, planes: Planes) -> Planes:
        """The slice of the planes of a matrix, or of gate or up alone."""
        matrix = whole.matrices[which]
        return cut_planes(planes, whole.form, part.form, self.parts(matrix, which))

    def payloads(
        self, whole: NarrowLayout, part: NarrowLayout, payloads: torch.Tensor
    ) -> torch.Tensor:
        """`[N, payload_bytes]` uint8 of slices, of those of whole experts."""
        size = (len(payloads), part.payload_bytes)
        kept = torch.zeros(size, dtype=torch.uint8, device=payloads.device)
        for which, matrix in enumerate(whole.matrices):
            planes = self.cut(whole, part, which, matrix.views(payloads))
            for view, plane in zip(part.matrices[which].views(kept), planes, strict=True):
                if view is not None and plane is not None:
                    view.copy_(plane)
        return kept


@torch.no_grad()
def slice_experts(experts: LayerExperts, rank: int, size: int, name: str) -> None:
    """Leave the experts of a layer with the slices of one rank, in place; on `meta` too.

    The bias of the second product is rank 0's alone, zeros elsewhere, as outputs are summed.

    Args:
        experts: whole, of a layer whose gate is known by its module; or in few bits, and slices
            already but for their biases.
        rank: whose slices they become.
        size: number of ranks.
        name: of the model, for messages.

    Raises:
        ConfigError, ModelError: as `ExpertSlice.of` says.
    """
    part = ExpertSlice.of(experts, rank, size, name)
    sliced: dict[str, torch.Tensor] = {}
    for weight_name, weight, each in zip(
        experts.names, experts.weights or (), (part.up, part.down), strict=False
    ):
        dim = 2 - each.dim if experts.is_transposed else 1 + each.dim
        sliced[weight_name] = Part(dim, each.slices).of(weight)
    if experts.biases is not None:
        up_bias, down_bias = experts.biases
        sliced[f"{experts.up_name}_bias"] = Part(1, part.up.slices).of(up_bias)
        sliced["down_proj_bias"] = torch.zeros_like(down_bias) if rank else down_bias
    for parameter, values in sliced.items():
        kept = values.clone(memory_format=torch.contiguous_format)
        experts.module._parameters[parameter] = nn.Parameter(kept, requires_grad=False)
    experts.is_sliced = True
