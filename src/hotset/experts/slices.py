"""Experts cut along their middle: a rank has the same part of each, and outputs add up.

Every rank so reads, keeps and copies as many bytes, whatever experts a step needs.
"""

import torch
from torch import nn

from hotset.errors import ConfigError, ModelError
from hotset.experts.weights import LayerExperts, Resident


@torch.no_grad()
def slice_experts(experts: LayerExperts, rank: int, size: int, name: str) -> None:
    """Leave the experts of a layer with the slices of one rank, in place; on `meta` too.

    The bias of the second product is rank 0's alone, zeros elsewhere, as outputs are summed.

    Args:
        experts: resident, whole, of a layer whose gate is known by its module.
        rank: whose slices they become.
        size: number of ranks.
        name: of the model, for messages.

    Raises:
        ConfigError: the middle does not divide by `size`.
        ModelError: a norm follows the second product, so that parts do not add up.
    """
    assert isinstance(experts.state, Resident) and experts.weights is not None
    if experts.has_post_norm:
        raise ModelError(f"the experts of {name} end in a norm, so their parts do not add up")
    module = experts.module
    up, down = experts.weights
    middle = down.shape[1 if experts.is_transposed else 2]
    if middle % size:
        raise ConfigError(
            f"tp={size} does not divide the {middle} columns of the experts of {name}"
        )
    part = slice(rank * middle // size, (rank + 1) * middle // size)
    up_dim, down_dim = (2, 1) if experts.is_transposed else (1, 2)
    sliced = {experts.up_name: _up(experts, up, part, up_dim)}
    sliced["down_proj"] = down.movedim(down_dim, 0)[part].movedim(0, down_dim)
    if experts.biases is not None:
        up_bias, down_bias = experts.biases
        sliced[f"{experts.up_name}_bias"] = _up(experts, up_bias, part, 1)
        sliced["down_proj_bias"] = torch.zeros_like(down_bias) if rank else down_bias
    for parameter, values in sliced.items():
        kept = values.clone(memory_format=torch.contiguous_format)
        module._parameters[parameter] = nn.Parameter(kept, requires_grad=False)
    experts.is_sliced = True


def _up(experts: LayerExperts, weight: torch.Tensor, part: slice, dim: int) -> torch.Tensor:
    """The slice of what makes the middle: of gate and up, where they are stored in one."""
    weight = weight.movedim(dim, 0)
    if not experts.has_gate:
        kept = weight[part]
    elif experts.module.is_concatenated:
        kept = torch.cat([half[part] for half in weight.chunk(2)])
    else:  # gate and up in turn
        kept = weight[2 * part.start : 2 * part.stop]
    return kept.movedim(0, dim)
