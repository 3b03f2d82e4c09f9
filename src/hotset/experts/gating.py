"""Dynamic gating: each expert computes its own tokens and no others.

The tokens are sorted by expert and counted, and every product runs over the rows that an expert
really got: no capacity, no padding, no dropped token. Source: Huang et al., "Toward Efficient
Inference for Mixture of Experts", NeurIPS 2024.
"""

import contextlib
import itertools
import logging
import weakref
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hotset.cost.config_sizes import num_experts
from hotset.experts.resident import is_fused, resident_experts
from hotset.linear.packed import PackedLinear

IMPLEMENTATION = "hotset"

# A module of that interface: transformers gives it attributes that no class of it declares.
Experts: TypeAlias = Any

_log = logging.getLogger(__name__)

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # whose user knows how experts are computed
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register() -> None:
    """Make dynamic gating known to transformers as the experts implementation `hotset`."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, dynamic_experts)


def use_dynamic_gating(model: PreTrainedModel) -> int:
    """Switch the experts of `model` to dynamic gating, in place; how many layers that are.

    A model whose experts do not use transformers' experts interface, or hold quantised weights,
    is left to compute them as it does, and a warning says so, once for each model. 0 for a model
    without experts.
    """
    layers = experts_layers(model)
    if layers and all(is_plain(layer) for layer in layers):
        register()
        model.set_experts_implementation(IMPLEMENTATION)
        if all(layer.config._experts_implementation == IMPLEMENTATION for layer in layers):
            return len(layers)
    if model.device.type == "meta":  # the model itself follows, and says so then
        return 0
    has_experts = layers or num_experts(model.config.get_text_config()) > 1
    if has_experts and model not in _told:
        _told.add(model)
        _log.warning(
            "%s computes its experts in its own way, without dynamic gating", type(model).__name__
        )
    return 0


@contextlib.contextmanager
def without_experts(model: PreTrainedModel) -> Iterator[None]:
    """Within it, experts that are on `meta` or not on the model's device add nothing."""
    replaced = []
    for layer in experts_layers(model):
        weight = getattr(layer, up_name(layer), None)
        is_elsewhere = weight is not None and (weight.device != model.device or weight.is_meta)
        if is_elsewhere or hasattr(layer, "expert_host"):
            replaced.append((layer, getattr(layer, "expert_buffer", None)))
            layer.expert_buffer = _NoExperts()
    try:
        yield
    finally:
        for layer, buffer in replaced:
            layer.expert_buffer = buffer


@contextlib.contextmanager
def noting_top_k(model: nn.Module) -> Iterator[set[int]]:
    """Within it, the numbers of experts that tokens are routed to are added to what it gives."""
    chosen: set[int] = set()

    def note(layer: nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        ids = named.get("top_k_index", args[1] if len(args) > 1 else None)
        if ids is not None:
            chosen.add(ids.shape[-1])

    hooks = [
        layer.register_forward_pre_hook(note, with_kwargs=True) for layer in experts_layers(model)
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


class _NoExperts:
    """Stands for the buffer of a layer."""

    def forward(
        self, layer: Experts, hidden_states: torch.Tensor, *routing: torch.Tensor
    ) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def pack_experts(model: nn.Module) -> None:
    """Pack the weights of float32 experts on the CPU, in place, one layer at a time.

    As `pack_linears` does, and for the same reason; only layers that dynamic gating computes. The
    stacked weights are not kept. Measured in docs/moe_study.md.
    """
    if not torch.backends.mkldnn.is_available():
        return
    with torch.inference_mode():
        for layer in experts_layers(model):
            if layer.config._experts_implementation != IMPLEMENTATION:
                continue
            for name in (up_name(layer), "down_proj"):
                weight = getattr(layer, name)
                if weight is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
                    continue
                packed = nn.ModuleList(
                    _pack(layer, name, expert) for expert in range(layer.num_experts)
                )
                setattr(layer, f"packed_{name}", packed)
                setattr(layer, name, None)


def unpack_experts(model: nn.Module) -> None:
    """Undo `pack_experts`, in place, one layer at a time: the weights are the same bits."""
    with torch.inference_mode():
        for layer in experts_layers(model):
            for name in (up_name(layer), "down_proj"):
                packed = getattr(layer, f"packed_{name}", None)
                if packed is None:
                    continue
                matrices = [linear.dense_weight() for linear in packed]
                if layer.is_transposed:
                    matrices = [matrix.t() for matrix in matrices]
                delattr(layer, f"packed_{name}")
                setattr(layer, name, nn.Parameter(torch.stack(matrices), requires_grad=False))


def dynamic_experts(
    layer: Experts,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of each token's experts.

    T = tokens, K = experts of a token, E = experts of the layer, H = hidden size. With bfloat16
    weights on a GPU, and float16 ones that the fused kernels take, all shapes are fixed and nothing
    is read by the host, so that a CUDA graph can record it. Elsewhere the host reads the counts,
    and the experts that got rows run in turn.

    Args:
        layer: experts of transformers' experts interface.
        hidden_states: `[T, H]`.
        top_k_index: `[T, K]` integer expert ids; those of E and more are another rank's and add
            nothing. Not changed.
        top_k_weights: `[T, K]`.

    Returns:
        `[T, H]`, dtype of `hidden_states`; a token's K rows are summed in the order of K.
    """
    routing_counts = getattr(layer, "routing_counts", None)
    if routing_counts is not None:  # somebody records who goes where
        routing_counts.add(top_k_index)
    out: torch.Tensor
    buffer = getattr(layer, "expert_buffer", None)
    if buffer is not None:  # only some are on the device
        out = buffer.forward(layer, hidden_states, top_k_index, top_k_weights)
        return out
    num_tokens, top_k = top_k_index.shape
    if is_fused(layer, num_tokens * top_k):
        out = resident_experts(
            hidden_states, top_k_index, top_k_weights, layer.gate_up_proj, layer.down_proj
        )
        return out
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)  # [T * K]
    experts = torch.arange(layer.num_experts, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)  # [E]
    rows = hidden_states[order // top_k]
    rows = _product(layer, up_name(layer), rows, ids, ends)
    rows = layer._apply_gate(rows) if layer.has_gate else layer.act_fn(rows)
    rows = _product(layer, "down_proj", rows, ids, ends)
    if getattr(layer, "has_post_expert_norm", False):
        rows = layer.post_expert_norm(rows)
    if getattr(layer, "_is_expert_parallel", True):
        # Rows of other ranks were not computed: their memory holds anything, NaN too.
        rows = rows.masked_fill((ids >= layer.num_experts).unsqueeze(-1), 0)
    places = torch.arange(len(order), device=order.device)
    back = torch.empty_like(order).scatter_(0, order, places)
    weighted = rows[back].view(num_tokens, top_k, -1) * top_k_weights.unsqueeze(-1)
    summed: torch.Tensor = weighted.sum(1)
    return summed.to(hidden_states.dtype)


def _product(
    layer: Experts, name: str, rows: torch.Tensor, ids: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """`[R, in]` rows sorted by expert to `[R, out]`; anything in rows beyond the last end."""
    out: torch.Tensor
    weight = getattr(layer, name)
    if weight is None or not has_grouped_kernel(weight):
        out = _product_in_turn(layer, name, rows, ends)
        return out
    weight = weight if layer.is_transposed else weight.transpose(1, 2)  # [E, in, out]
    out = functional.grouped_mm(rows, weight, offs=ends)
    if layer.has_bias:
        out = out + getattr(layer, f"{name}_bias")[ids.clamp(max=layer.num_experts - 1)]
    return out


def has_grouped_kernel(weight: torch.Tensor) -> bool:
    """Whether PyTorch has a kernel for it that does not read the counts on the host.

    For other dtypes `grouped_mm` is a loop on the host too, and it wants rows of 16 bytes.
    """
    return (
        weight.device.type == "cuda"
        and weight.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and all(size * weight.itemsize % 16 == 0 for size in weight.shape[1:])
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _product_in_turn(
    layer: Experts, name: str, rows: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """`_product`, one expert after another; zeros in rows beyond the last end."""
    bounds = [0, *ends.tolist()]
    pieces = [
        _product_of_one(layer, name, expert, rows[start:end])
        for expert, (start, end) in enumerate(itertools.pairwise(bounds))
        if start < end
    ]
    if not pieces:  # all are other ranks' rows, which nobody reads
        return _product_of_one(layer, name, 0, rows)
    if num_beyond := len(rows) - bounds[-1]:
        pieces.append(rows.new_zeros(num_beyond, pieces[0].shape[1]))
    return torch.cat(pieces)


def _product_of_one(layer: Experts, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    packed = getattr(layer, f"packed_{name}", None)
    out: torch.Tensor
    if packed is not None:
        out = packed[expert](rows)
    else:
        out = functional.linear(rows, _matrix(layer, name, expert))
    if layer.has_bias:
        out += getattr(layer, f"{name}_bias")[expert]
    return out


def _matrix(layer: Experts, name: str, expert: int) -> torch.Tensor:
    """The `[out, in]` weight of one expert."""
    weight: torch.Tensor = getattr(layer, name)[expert]
    return weight.t() if layer.is_transposed else weight


def _pack(layer: Experts, name: str, expert: int) -> PackedLinear:
    return pack_matrix(_matrix(layer, name, expert))


def pack_matrix(matrix: torch.Tensor) -> PackedLinear:
    """Pack the `[out, in]` float32 weight of one expert."""
    matrix = matrix.contiguous()
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    return PackedLinear(linear)


def experts_layers(model: nn.Module) -> list[Experts]:
    """The layers that transformers' decorator made exchangeable."""
    return [module for module in model.modules() if is_experts(module)]


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' decorator made it exchangeable."""
    marks = ("is_transposed", "has_gate", "has_bias", "_apply_gate", "num_experts")
    return all(hasattr(module, mark) for mark in marks)


def is_plain(layer: Experts) -> bool:
    """Whether the weights are there and numbers as they are; None are those that are packed."""
    weights = [getattr(layer, name, None) for name in (up_name(layer), "down_proj")]
    return all(weight is None or weight.dtype in _DTYPES for weight in weights)


def move_but_experts(model: nn.Module, device: torch.device) -> None:
    """Move a model to `device`, but for the weights of experts of transformers' interface."""
    kept = {id(layer): (up_name(layer), "down_proj") for layer in experts_layers(model)}
    for module in model.modules():
        names = kept.get(id(module), ())
        weights = {name: module._parameters.pop(name) for name in names}
        module._apply(lambda tensor: tensor.to(device), recurse=False)
        module._parameters.update(weights)


def up_name(layer: Experts) -> str:
    """What the weight of the first product is called."""
    return "gate_up_proj" if layer.has_gate else "up_proj"
