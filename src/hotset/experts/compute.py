"""What an expert computes, and what becomes of its rows: once, wherever experts are.

An expert is `down(gate(up(row)))`. Its rows lie sorted by expert, so that every product runs over
the rows that it really got, in one of three ways: by fused kernels, by PyTorch's grouped products,
or one expert after another.
"""

import itertools
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from hotset.cost.tuning import TUNINGS
from hotset.experts.narrow import LAYOUTS
from hotset.experts.weights import Experts, LayerExperts, Narrow, Packed
from hotset.kernels.narrow_forms import Gate

FUSED_MOST_ROWS_PER_EXPERT = TUNINGS["cuda"].fused_rows_per_expert

# Stacked weights of both products, `[N, *up]` and `[N, *down]`.
Weights = tuple[torch.Tensor, torch.Tensor]
# The up (0) or down (1) product of one expert: which, expert, `[R, in]` -> `[R, out]`.
Multiply = Callable[[int, int, torch.Tensor], torch.Tensor]

# By device, address, number of experts and bytes of one. The values follow from the key, so that
# no table can be wrong, whatever became of the weights; recorded graphs may read it for ever.
_tables: dict[tuple[torch.device, int, int, int], torch.Tensor] = {}


def compute_resident(
    layer: Experts,
    experts: LayerExperts,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """As `dynamic_experts`, of experts that are all here: resident or packed."""
    num_tokens, top_k = top_k_index.shape
    out: torch.Tensor
    if isinstance(experts.state, Narrow):
        step = hidden_states, top_k_index, top_k_weights
        return _compute_narrow(layer, experts, experts.state, *step)
    weights = stacked(layer, experts)
    if is_fused(experts, weights, num_tokens * top_k):
        assert weights is not None
        out = resident_experts(hidden_states, top_k_index, top_k_weights, *weights)
        return out
    ids, order, ends = by_group(top_k_index.reshape(-1), experts.num_experts)
    rows = hidden_states[order // top_k]
    if weights is not None and all(map(has_grouped_kernel, weights)):
        is_transposed = experts.is_transposed
        rows = grouped(layer, experts, rows, weights, ids, ends, is_transposed=is_transposed)
    else:
        rows = _resident_in_turn(layer, experts, rows, ends)
    places = torch.arange(len(order), device=order.device)
    back = torch.empty_like(order).scatter_(0, order, places)
    return weighted_sum(layer, experts, rows[back], top_k_index, top_k_weights, hidden_states.dtype)


def _compute_narrow(
    layer: Experts,
    experts: LayerExperts,
    state: Narrow,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    assert experts.gate is not None
    up_bias = down_bias = None
    if experts.has_bias:
        up_bias, down_bias = (getattr(layer, f"{name}_bias") for name in experts.names)
    out: torch.Tensor = narrow_resident_experts(
        *(hidden_states, top_k_index, top_k_weights, state.payloads, up_bias, down_bias),
        *(state.narrow.key, experts.gate.alpha, experts.gate.limit),
    )
    return out


def stacked(layer: Experts, experts: LayerExperts) -> Weights | None:
    """The stacked weights of resident experts; None of packed ones."""
    if isinstance(experts.state, Packed):
        return None
    return getattr(layer, experts.up_name), layer.down_proj


def is_fused(experts: LayerExperts, weights: Weights | None, num_rows: int) -> bool:
    """Whether the fused kernels compute `num_rows` rows of a layer with such stacked weights.

    They do where an expert is `down(silu(gate) * up)` with a gate as transformers has it by
    default, without bias, in 16 bits on a GPU, each matrix in one piece with rows of 16 bytes.
    """
    if weights is None or not (experts.has_silu_gate and has_fused_kernel(weights[0])):
        return False
    if not all(map(_is_in_one_piece, weights)) or any(size % 8 for size in weights[1].shape[1:]):
        return False
    is_large = num_rows > FUSED_MOST_ROWS_PER_EXPERT * experts.num_experts
    return not is_large or weights[0].dtype == torch.float16


def has_fused_kernel(weight: torch.Tensor) -> bool:
    """Whether the kernels can read a weight where it is."""
    return (
        weight.device.type == "cuda"
        and weight.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    )


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


def _is_in_one_piece(weight: torch.Tensor) -> bool:
    """Whether each matrix of a stacked weight is; they may be apart."""
    return weight.stride()[1:] == (weight.shape[2], 1)


def by_group(
    groups: torch.Tensor, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[R]` integer groups of rows, sorted; the rows in that order; and where each group ends.

    The ends are `[num_groups]` int32. Rows of groups beyond the last come behind them.
    """
    ids, order = torch.sort(groups, stable=True)
    numbers = torch.arange(num_groups, device=ids.device, dtype=ids.dtype)
    return ids, order, torch.searchsorted(ids, numbers, right=True, out_int32=True)


def bounds_of(ends: torch.Tensor) -> dict[int, tuple[int, int]]:
    """Where the rows of each expert that has some begin and end; waits for the device."""
    pairs = enumerate(itertools.pairwise([0, *ends.tolist()]))
    return {expert: (start, end) for expert, (start, end) in pairs if start < end}


def gate(layer: Experts, experts: LayerExperts, rows: torch.Tensor) -> torch.Tensor:
    """What is between the products."""
    out: torch.Tensor = layer._apply_gate(rows) if experts.has_gate else layer.act_fn(rows)
    return out


def grouped(
    layer: Experts,
    experts: LayerExperts,
    rows: torch.Tensor,
    weights: Weights,
    ids: torch.Tensor,
    ends: torch.Tensor,
    *,
    is_transposed: bool,
) -> torch.Tensor:
    """Both products by PyTorch's grouped kernels; nothing is read by the host.

    G = groups, each of which has an expert; R = rows, sorted by group.

    Args:
        layer: tells what is between the products, and has the biases.
        experts: of the layer.
        rows: `[R, H]`.
        weights: `[G, *up]` and `[G, *down]`.
        ids: `[R]` the expert of each row, for its bias.
        ends: `[G]` int32, where the rows of each group end.
        is_transposed: whether weights are `[in, out]`.

    Returns:
        `[R, H]`; anything, NaN too, in rows beyond the last end.
    """

    def product(name: str, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        weight = weight if is_transposed else weight.transpose(1, 2)  # [G, in, out]
        out: torch.Tensor = functional.grouped_mm(rows, weight, offs=ends)
        if experts.has_bias:
            out = out + getattr(layer, f"{name}_bias")[ids.clamp(max=experts.num_experts - 1)]
        return out

    up, down = weights
    middle = gate(layer, experts, product(experts.up_name, up, rows))
    return product("down_proj", down, middle)


def in_turn(
    layer: Experts,
    experts: LayerExperts,
    rows: torch.Tensor,
    out: torch.Tensor,
    bounds: Mapping[int, tuple[int, int]],
    multiply: Multiply,
) -> None:
    """Compute the rows of some experts, one after another, into the same rows of `out`.

    Args:
        layer: as for `grouped`.
        experts: likewise.
        rows: `[R, H]`, those of one expert adjacent.
        out: `[R, H]`. Rows of no expert in `bounds` stay as they are.
        bounds: by expert, where its rows begin and end.
        multiply: its products, without the bias.
    """

    def product(which: int, source: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        for expert, (start, end) in bounds.items():
            piece = multiply(which, expert, source[start:end])
            if experts.has_bias:
                piece += getattr(layer, f"{experts.names[which]}_bias")[expert]
            if target is None:
                target = piece.new_zeros(len(source), piece.shape[1])
            target[start:end] = piece
        assert target is not None
        return target

    if bounds:
        # All rows, in their places: vector instructions round as they do with all experts.
        middle = gate(layer, experts, product(0, rows, None))
        product(1, middle, out)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _resident_in_turn(
    layer: Experts, experts: LayerExperts, rows: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """`[R, H]` of all experts; zeros in rows beyond the last end. The host reads the counts."""
    state = experts.state

    def multiply(which: int, expert: int, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor
        if isinstance(state, Packed):
            out = (state.up, state.down)[which][expert](rows)
            return out
        weight = getattr(layer, experts.names[which])[expert]
        return functional.linear(rows, weight.t() if experts.is_transposed else weight)

    out = torch.zeros_like(rows)
    in_turn(layer, experts, rows, out, bounds_of(ends), multiply)
    return out


def weighted_sum(
    layer: Experts,
    experts: LayerExperts,
    rows: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What becomes of the rows: norm, weights and each token's sum, in the order of K.

    Args:
        layer: as for `grouped`.
        experts: likewise.
        rows: `[T * K, H]`, in the order of `top_k_index`.
        top_k_index: `[T, K]`; rows of ids of E and more may hold anything, and add nothing.
        top_k_weights: `[T, K]`.
        dtype: of the sums.

    Returns:
        `[T, H]`.
    """
    if experts.has_post_norm:
        rows = layer.post_expert_norm(rows)
    if experts.masks_others:
        rows = rows.masked_fill(top_k_index.reshape(-1, 1) >= experts.num_experts, 0)
    weighted = rows.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
    return weighted.sum(1).to(dtype)


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
        ids: `[T, K]` integer; ids from E on add nothing.
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
def _(hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("hotset::narrow_resident_experts", mutates_args=())
def narrow_resident_experts(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    payloads: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    layout: str,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """`narrow_experts` with all experts of a layer, as one operation for the compiler.

    T = tokens, K = experts of a token, E = experts, H = hidden size, I = middle size.

    Args:
        hidden: `[T, H]`.
        ids: `[T, K]` integer; ids from E on add nothing.
        weights: `[T, K]`.
        payloads: `[E, payload_bytes]` uint8.
        up_bias: `[E, 2 * I]`; None where the layer has no biases.
        down_bias: `[E, H]`; likewise.
        layout: of a payload, its key in `LAYOUTS`.
        alpha: see `Gate`.
        limit: likewise.

    Returns:
        `[T, H]`, dtype of `hidden`.
    """
    from hotset.kernels.narrow_experts import narrow_experts

    biases = None if up_bias is None or down_bias is None else (up_bias, down_bias)
    return narrow_experts(
        hidden.contiguous(),
        ids.contiguous(),
        weights.contiguous(),
        address_table(payloads),
        LAYOUTS[layout],
        Gate(alpha, limit),
        biases=biases,
    )


@narrow_resident_experts.register_fake
def _(hidden: torch.Tensor, *others: object) -> torch.Tensor:
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
