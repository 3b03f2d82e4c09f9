"""Layers whose experts are all on the GPU, and which of them the fused kernels compute."""

from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from hotset.cost.tuning import TUNINGS

FUSED_MOST_ROWS_PER_EXPERT = TUNINGS["cuda"].fused_rows_per_expert

# By device, address, number of experts and bytes of one. The values follow from the key, so that
# no table can be wrong, whatever became of the weights; recorded graphs may read it for ever.
_tables: dict[tuple[torch.device, int, int, int], torch.Tensor] = {}


def is_fused(layer: Any, num_rows: int) -> bool:
    """Whether the fused kernels compute `num_rows` rows of this layer.

    They do where an expert is `down(silu(gate) * up)` with a gate as transformers has it by
    default, without bias, in 16 bits on a GPU.
    """
    if not (has_silu_gate(layer) and has_fused_kernel(layer.gate_up_proj)):
        return False
    is_large = num_rows > FUSED_MOST_ROWS_PER_EXPERT * layer.num_experts
    return not is_large or layer.gate_up_proj.dtype == torch.float16


def has_silu_gate(layer: Any) -> bool:
    """Whether an expert of the layer is `down(silu(gate) * up)`, each weight as `[out, in]`."""
    return bool(
        applies_silu_gate(layer)
        and layer.gate_up_proj is not None
        and layer.gate_up_proj.is_contiguous()
        and layer.down_proj.is_contiguous()
        # Rows of 16 bytes.
        and all(size % 8 == 0 for size in layer.down_proj.shape[1:])
    )


def applies_silu_gate(layer: Any) -> bool:
    """Whether an expert of the layer is that, wherever its weights are."""
    return bool(
        layer.has_gate
        and layer.is_concatenated
        and not layer.is_transposed
        and not layer.has_bias
        and not getattr(layer, "has_post_expert_norm", False)
        and type(layer)._apply_gate is _default_apply_gate
        and type(layer.act_fn) in (nn.SiLU, SiLUActivation)
    )


def has_fused_kernel(weight: torch.Tensor) -> bool:
    """Whether the kernels can read a weight where it is."""
    return (
        weight.device.type == "cuda"
        and weight.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    )


@torch.library.custom_op("hotset::resident_experts", mutates_args=())
def resident_experts(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """`fused_experts` with the stacked weights of a layer, as one operation for the compiler.

    T = tokens, K = experts of a token, E = experts, H = hidden size, I = middle size.

    Args:
        hidden: `[T, H]`.
        ids: `[T, K]` integer; those of E and more add nothing.
        weights: `[T, K]`.
        up: `[E, 2 * I, H]`, dtype of `hidden`, contiguous.
        down: `[E, H, I]`, likewise.

    Returns:
        `[T, H]`, dtype of `hidden`.
    """
    from hotset.kernels.fused_experts import fused_experts

    return fused_experts(
        hidden.contiguous(),
        ids.contiguous(),
        weights.contiguous(),
        address_table(up),
        address_table(down),
        down.shape[2],
    )


@resident_experts.register_fake
def _(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


def address_table(stacked: torch.Tensor) -> torch.Tensor:
    """`[E]` int64 on the device: where each expert of a stacked weight begins. Do not change it.

    Made once for each place that weights have been at, and kept.
    """
    first, step = stacked.data_ptr(), stacked.stride(0) * stacked.itemsize
    assert first % 16 == 0 and step % 16 == 0
    key = (stacked.device, first, len(stacked), step)
    table = _tables.get(key)
    if table is None:
        table = torch.arange(len(stacked), device=stacked.device).mul_(step).add_(first)
        if stacked.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return table  # made by each replay, and in the memory of that graph
            torch.cuda.current_stream(stacked.device).synchronize()  # other streams will read it
        _tables[key] = table
    return table
