"""A model of which this process' rank has its part."""

import weakref
from typing import Any

import torch
from torch import nn

from hotset.errors import ConfigError, ModelError
from hotset.experts.gating import layers_to_gate
from hotset.experts.parallel import keep_own
from hotset.experts.slices import ExpertSlice, slice_experts
from hotset.experts.weights import LayerExperts, experts_of, is_experts
from hotset.parallel.collectives import all_reduce
from hotset.parallel.cuts import Cut, Table, find_cuts
from hotset.parallel.group import current
from hotset.parallel.linears import Gathered, Summed, cut_module
from hotset.parallel.norms import join_norm
from hotset.parallel.parts import Part, length_of
from hotset.parallel.tokens import gather_tokens, scatter_sums


class ModelCutter:
    """Cuts the layers of a model for this rank; does nothing in a group of one.

    Args:
        outline: the model, whole, on `meta` or not: its layers are looked at and left alone.
        name: of the model, for messages.

    Raises:
        ConfigError, ModelError: it cannot be cut for this number of ranks; see `find_cuts`.
    """

    def __init__(self, outline: Any, name: str) -> None:
        self._rank, self._layout, size = current().rank, current().layout, current().size
        if size == 1:
            self._table = Table(1)
        elif self._layout.dp == 1:
            self._table = find_cuts(outline, size, name)
        else:
            self._table = Table(size, dict.fromkeys(_paths_of_experts(outline), Cut.EXPERTS))
            if not self._table.cuts:
                raise ConfigError(
                    f"dp={self._layout.dp} has ranks share experts, and {name} has none; give tp, "
                    "or start several engines: hotset fleet"
                )
        self._name = name
        self._cut: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._vocab_size = outline.config.get_text_config().vocab_size
        if Cut.EXPERTS in self._table.cuts.values() and not layers_to_gate(outline):
            raise ModelError(
                f"{name} computes its experts in its own way, which ranks cannot share; use one GPU"
            )

    @property
    def is_idle(self) -> bool:
        """Whether all layers stay whole."""
        return self._table.size == 1

    @property
    def head_weights(self) -> frozenset[str]:
        """Names of weights that are cut by `join_outputs`, once they are read."""
        cuts = self._table.cuts.items()
        return frozenset(f"{path}.weight" for path, how in cuts if how is Cut.HEAD)

    def slice_of(self, experts: LayerExperts) -> ExpertSlice | None:
        """This rank's part of each expert of a layer, which are whole; None where they stay so.

        Raises:
            ConfigError, ModelError: they cannot be cut.
        """
        if self.is_idle or self._layout.ep > 1:
            return None
        return ExpertSlice.of(experts, self._rank, self._table.size, self._name)

    @torch.no_grad()
    def cut(self, path: str, module: nn.Module) -> dict[str, Part]:
        """Leave a module with this rank's part, in place, if it is one to be cut; not the head.

        Returns:
            By name of a parameter, which part of it is left; parameters of experts have no entry.
        """
        how = self._table.cuts.get(path)
        if how is None or how is Cut.HEAD:
            return {}
        if how is Cut.EXPERTS:
            experts, size = experts_of(module), self._table.size
            if self._layout.ep == 1:
                slice_experts(experts, self._rank, size, self._name)
            elif experts.weights is not None:
                keep_own(experts, self._rank, size, current().device)
            return {}
        return cut_module(module, self._table, path, self._rank)

    def cut_all(self, model: nn.Module) -> dict[str, Part]:
        """`cut` for every module; returns the parts by the whole name of a parameter.

        A model that was cut stays as it is.
        """
        parts: dict[str, Part] = {}
        if model in self._cut:
            return parts
        self._cut.add(model)
        for path, module in list(model.named_modules()):
            for name, part in self.cut(path, module).items():
                parts[f"{path}.{name}"] = part
        return parts

    @torch.no_grad()
    def cut_head(self, model: Any) -> None:
        """Leave the head with this rank's columns, in place."""
        for path, how in self._table.cuts.items():
            if how is Cut.HEAD:
                head, embedding = model.get_submodule(path), model.get_input_embeddings()
                shared = embedding.weight if head.weight is embedding.weight else None
                part = cut_module(head, self._table, path, self._rank)["weight"]
                if shared is not None:  # in the same memory, as before
                    head.weight = nn.Parameter(part.of(shared), requires_grad=False)

    def join_outputs(self, model: nn.Module) -> None:
        """Have layers that are cut give what whole ones do, by sums over ranks and the like.

        Cuts the head, whose weight may be an embedding's; that stays whole. The last of all
        changes, as paths of layers change.
        """
        self.cut_head(model)
        for path, how in self._table.cuts.items():
            module = model.get_submodule(path)
            if how is Cut.EXPERTS:
                assert is_experts(module)
                experts = experts_of(module)
                if self._layout.ep > 1 and experts.shard is None:  # in few bits, all of them so far
                    keep_own(experts, self._rank, self._layout.gpus, current().device)
                experts.combine = all_reduce
                if self._layout.dp > 1:
                    experts.gather, experts.combine = gather_tokens, scatter_sums
            elif how in (Cut.ROWS, Cut.HEAD, Cut.NORM):
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, self._joined(how, path, module))

    def _joined(self, how: Cut, path: str, module: nn.Module) -> nn.Module:
        """What gives what the whole of a layer does, of this rank's part."""
        if how is Cut.ROWS:
            return Summed(module)
        if how is Cut.HEAD:
            return Gathered(module, self._vocab_size)
        return join_norm(module, length_of(self._table.layouts[path]))


def _paths_of_experts(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if is_experts(module)]
