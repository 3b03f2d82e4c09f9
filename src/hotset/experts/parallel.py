"""Experts spread over ranks as a placement has it, each computing its own for the whole batch.

As `AllReduceEP` of transformers: every rank holds the same batch and the same other layers, ids
that are not its own become `num_experts`, which the experts interface skips, and
`torch.distributed` sums what the ranks computed. transformers gives each rank as many experts, in
order; here a placement says which, and an expert that is busy may be on several ranks, to which
its tokens are dealt out.
"""

from collections.abc import Sequence

import torch
from torch import distributed
from transformers import PreTrainedModel

from hotset.errors import ConfigError
from hotset.experts.gating import gated_layers
from hotset.experts.placement import Placement, in_order
from hotset.experts.weights import LayerExperts, Narrow, Resident, Shard


class LocalIds:
    """What one rank makes of the ids of a layer's router; only fixed shapes, for CUDA graphs.

    Args:
        placement: of the layer.
        rank: whose.
        device: of the ids.

    Attributes:
        experts: ids of this rank's experts, in the order of their local ids.
    """

    def __init__(self, placement: Placement, rank: int, device: torch.device) -> None:
        copies = placement.num_copies
        self.experts = placement.devices[rank]
        slots, turns = [len(self.experts)] * len(copies), [-1] * len(copies)
        for slot, expert in enumerate(self.experts):
            slots[expert] = slot
            turns[expert] = sum(expert in held for held in placement.devices[:rank])
        counts = [copies[expert] for expert in range(len(copies))]
        self._slots, self._turns, self._copies = (
            torch.tensor(values, device=device) for values in (slots, turns, counts)
        )

    def __call__(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """`[T, K]` ids of the router to `[T, K]` of this rank: `len(experts)` for others' work.

        Of an expert with c copies, copy i computes tokens i, i + c, i + 2c, ... of the batch.
        """
        if top_k_index.is_meta:  # of a model without memory, which is looked at
            return top_k_index
        ids = top_k_index.long()
        tokens = torch.arange(len(ids), device=ids.device).unsqueeze(-1)
        is_mine = tokens % self._copies[ids] == self._turns[ids]
        return torch.where(is_mine, self._slots[ids], len(self.experts))


def shard_experts(
    model: PreTrainedModel,
    placements: Sequence[Placement] | None = None,
    group: distributed.ProcessGroup | None = None,
) -> int:
    """Keep this rank's experts only, in place, and sum over the ranks what experts compute.

    To be called by every rank of `group`, with dynamic gating switched on, before weights are
    packed and before anything is compiled or recorded. All ranks must then run the same batches.

    Args:
        model: with all experts of all layers.
        placements: of each layer with experts, in order; None has them in order.
        group: of the ranks; None for all.

    Returns:
        Bytes of experts that this rank has let go.

    Raises:
        ConfigError: the model has no experts that can be spread, or a placement is not of its
            experts and these ranks; the model is unchanged.
    """
    layers = gated_layers(model)
    if not layers:
        raise ConfigError("the model has no experts that dynamic gating computes: none to spread")
    if any(
        experts.is_spread
        or experts.shard is not None
        or experts.counts is not None
        or not isinstance(experts.state, Resident | Narrow)
        for experts in layers
    ):
        raise ConfigError(
            "experts can be spread once, and before they are packed, buffered or counted"
        )
    num_ranks, rank = distributed.get_world_size(group), distributed.get_rank(group)
    if placements is None:
        placements = [in_order(experts.num_experts, num_ranks) for experts in layers]
    if len(placements) != len(layers):
        raise ConfigError(
            f"{len(placements)} placements are given for {len(layers)} layers with experts"
        )
    for number, (experts, placement) in enumerate(zip(layers, placements, strict=True)):
        _check(number, experts, placement, num_ranks)

    def combine(out: torch.Tensor) -> torch.Tensor:
        distributed.all_reduce(out, group=group)
        return out

    freed_bytes = 0
    for experts, placement in zip(layers, placements, strict=True):
        local_ids = LocalIds(placement, rank, model.device)
        freed_bytes += experts.spread(Shard(local_ids), local_ids.experts)
        experts.combine = combine
    return freed_bytes


def keep_own(experts: LayerExperts, rank: int, num_ranks: int, device: torch.device) -> None:
    """Leave a layer with the whole experts of one rank, in order, in place; on `meta` too.

    The caller has the outputs of all ranks summed.

    Args:
        experts: of the layer, all of them.
        rank: whose experts are left.
        num_ranks: that share them.
        device: of the ids of routers.

    Raises:
        ConfigError: a rank would have no expert.
    """
    placement = in_order(experts.num_experts, num_ranks)
    if not all(placement.devices):
        raise ConfigError(
            f"ep leaves one of {num_ranks} GPUs without any of the {experts.num_experts} experts "
            "of a layer; give fewer GPUs, or leave ep out"
        )
    local_ids = LocalIds(placement, rank, device)
    experts.spread(Shard(local_ids), local_ids.experts)


def _check(number: int, experts: LayerExperts, placement: Placement, num_ranks: int) -> None:
    if len(placement.devices) != num_ranks:
        raise ConfigError(
            f"the placement of layer {number} is for {len(placement.devices)} devices and there "
            f"are {num_ranks} ranks"
        )
    if set(placement.num_copies) != set(range(experts.num_experts)):
        raise ConfigError(
            f"the placement of layer {number} is not of its {experts.num_experts} experts"
        )
    if any(len(set(held)) != len(held) for held in placement.devices):
        raise ConfigError(f"the placement of layer {number} has an expert twice on a device")
    if not all(placement.devices):
        raise ConfigError(
            f"the placement of layer {number} leaves a rank without experts; take fewer ranks"
        )
