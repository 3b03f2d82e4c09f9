"""Experts that a checkpoint has in few bits: their own bytes, from files to where they are kept.

Neither the model nor the loader ever has them wider: the model is made without their weights, and
what reads the others leaves theirs out.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from hotset.checkpoint.tensors import CheckpointTensors
from hotset.experts.disk import ExpertSink
from hotset.experts.host import ExpertLayout, HostExperts
from hotset.experts.narrow import NarrowLayout
from hotset.experts.slices import ExpertSlice
from hotset.experts.weights import (
    LayerExperts,
    Narrow,
    experts_layers,
    experts_of,
    is_experts,
)
from hotset.linear.narrow_matrix import Planes
from hotset.model.architecture import Architecture
from hotset.weight_format import MXFP4, WeightFormat

_NUM_THREADS = 4
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class _Place:
    """What a weight of a checkpoint is to a model.

    Attributes:
        path: of the module with experts, then the name of its weight.
        expert: which one; None where all of the layer are stacked.
        part: of the weight, in order.
    """

    path: str
    expert: int | None
    part: int


# Writes the `[payload_bytes]` uint8 of an expert, in any thread.
Fill = Callable[[int, torch.Tensor], None]
# Of one layer: which weight (0 is up, 1 is down), expert and part -> tensor and place in it.
_Parts = dict[tuple[int, int, int], tuple[str, int | None]]


@dataclass(frozen=True, slots=True)
class NarrowExperts:
    """Where the files have the experts of all layers.

    Attributes:
        tensors: of the checkpoint.
        stored: how an expert lies in the files.
        slice: which part of each expert this rank has; None is all.
        layout: of an expert, or its slice, as it is computed with.
        narrow: as it is kept.
        parts: by the path of its module, the parts of each layer.
        device: where they are all kept; None is host memory, or disk below it.
    """

    tensors: CheckpointTensors
    stored: NarrowLayout
    slice: ExpertSlice | None
    layout: ExpertLayout
    narrow: NarrowLayout
    parts: Mapping[str, _Parts]
    device: torch.device | None

    @property
    def names(self) -> frozenset[str]:
        """All weights of these experts."""
        return frozenset(name for parts in self.parts.values() for name, _ in parts.values())

    def num_bytes(self, outline: PreTrainedModel) -> int:
        """Of the payloads of all experts of a model."""
        num_experts = sum(experts.num_experts for experts in experts_layers(outline))
        return num_experts * self.narrow.payload_bytes

    def mark(self, outline: PreTrainedModel) -> None:
        """Say on a model without memory how its experts come."""
        for experts in experts_layers(outline):
            experts.narrow_in_file = self.narrow

    def load(self, model: PreTrainedModel, sink: ExpertSink | None) -> None:
        """Read them, layer by layer; hosted ones to where `sink` has room, if to a disk.

        Raises:
            ModelError: a number is none; TierError: the disk failed.
        """
        staged = None
        if self.device is not None:
            num_experts = experts_layers(model)[0].num_experts
            staged = torch.zeros(num_experts, self.narrow.payload_bytes, dtype=torch.uint8)
        with self.tensors.open_narrow() as read:
            for path, parts in self.parts.items():
                experts = experts_of(model.get_submodule(path))
                fill = self._fill(parts, read)
                if staged is not None:
                    _fill_all(fill, staged)
                    payloads = staged.to(self.device, copy=True)
                    experts.hold(Narrow(self.layout, self.narrow, payloads))
                elif sink is not None and sink.store is not None:
                    sink.take_payloads(experts, fill)
                else:
                    source = HostExperts(self.layout, experts.num_experts, self.narrow)
                    _fill_all(fill, source.payloads)
                    experts.host(source)

    def _fill(self, parts: _Parts, read: Callable[[str, int | None], Planes]) -> Fill:
        """Writes the payload of an expert of a layer."""
        by_expert: dict[int, list[tuple[int, int, str, int | None]]] = defaultdict(list)
        for (which, expert, part), (name, index) in parts.items():
            by_expert[expert].append((which, part, name, index))

        @torch.inference_mode()  # a mode of each thread
        def fill(expert: int, payload: torch.Tensor) -> None:
            for which, part, name, index in by_expert[expert]:
                planes = read(name, index)
                if self.slice is not None:
                    planes = self.slice.cut(self.stored, self.narrow, which, planes)
                self.narrow.write(which, part, payload, planes)

        return fill


def _fill_all(fill: Fill, payloads: torch.Tensor) -> None:
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(fill, range(len(payloads)), payloads))


def find_narrow_experts(
    outline: PreTrainedModel,
    tensors: CheckpointTensors,
    device: torch.device | None,
    slice_of: Callable[[LayerExperts], ExpertSlice | None] = lambda experts: None,
) -> NarrowExperts | None:
    """The experts of a checkpoint, where all of all layers are stored in one narrow format.

    None where there are none, layers differ, slices end within a byte, or the files have them in a
    way that moves values: those are dequantised while they are read.

    Args:
        outline: the model on `meta`.
        tensors: of the checkpoint.
        device: see `NarrowExperts`.
        slice_of: a layer's experts, which are whole -> the part of each that this rank has.
    """
    layers = {path: experts_of(m) for path, m in outline.named_modules() if is_experts(m)}
    kinds = {(each.num_experts, each.layout) for each in layers.values()}
    if tensors.narrow_format is None or len(kinds) != 1 or tensors.narrow_format.code == "table4":
        return None
    first = next(iter(layers.values()))
    is_stacked = tensors.narrow_format == MXFP4
    narrow = narrow_layout_of(first, tensors.narrow_format)
    if narrow is None:
        return None
    up, down = (matrix.shape for matrix in narrow.matrices)
    num_parts = 2 if len(up) == 3 else 1
    mapping = get_model_conversion_mapping(outline)
    found: dict[str, _Parts] = {path: {} for path in layers}
    names = {
        f"{path}.{name}": (path, which)
        for path, experts in layers.items()
        for which, name in enumerate(experts.names)
    }
    for name in sorted(tensors.narrow_names):
        place = _place_of(name, mapping)
        if place is None or (of := names.get(place.path)) is None:
            continue
        if (place.expert is None) != is_stacked:
            return None
        shape = (up, down)[of[1]]
        if tensors.shapes[name] != (_stacked(shape, first) if is_stacked else shape[-2:]):
            return None  # the reader of plain weights says what is wrong
        for expert in range(first.num_experts) if is_stacked else [place.expert]:
            assert expert is not None
            key = (of[1], expert, place.part)
            found[of[0]][key] = name, (expert if is_stacked else None)
    num_expected = first.num_experts * (num_parts + 1)
    if any(len(parts) != num_expected for parts in found.values()):
        return None
    part = slice_of(first)
    kept = narrow if part is None else part.narrow(narrow)
    if kept is None:
        return None
    layout = ExpertLayout.of_narrow(kept, first.layout.dtype)
    return NarrowExperts(tensors, narrow, part, layout, kept, found, device)


def narrow_layout_of(experts: LayerExperts, form: WeightFormat) -> NarrowLayout | None:
    """How an expert lies where a checkpoint has its matrices in `form`.

    Gate and up are apart, as most checkpoints have them; those in MXFP4 are stacked as the model
    has them. None where rows end within a byte.

    Args:
        experts: of a layer of a model on `meta`.
        form: of both matrices.
    """
    up, down = (
        _as_rows(shape, experts.layout) for shape in (experts.layout.up, experts.layout.down)
    )
    if experts.has_gate and form != MXFP4:
        up = (2, up[0] // 2, up[1])
    try:
        return NarrowLayout(up, down, form)
    except ValueError:
        return None


def without_experts(architecture: Architecture) -> Architecture:
    """The same, but models lose the weights of their experts once they are made."""
    model_class = architecture.model_class

    def init(self: PreTrainedModel, config: Any, *args: Any, **options: Any) -> None:
        model_class.__init__(self, config, *args, **options)
        for experts in experts_layers(self):
            for name in experts.names:
                setattr(experts.module, name, None)
            experts.module._is_hf_initialized = True  # transformers would fill what is not there

    namespace = {
        "__init__": init,
        "__module__": model_class.__module__,  # else transformers takes it for code of a checkpoint
        "__qualname__": model_class.__qualname__,
    }
    made = type(model_class.__name__, (model_class,), namespace)
    return replace(architecture, model_class=made)


def _place_of(name: str, mapping: list[Any]) -> _Place | None:
    """What transformers makes of a weight; None where it moves its values."""
    renamed, part = name, 0
    for entry in mapping:
        renamed, pattern = entry.rename_source_key(renamed)
        if pattern is not None and isinstance(entry, WeightConverter):
            operations = {type(operation).__name__ for operation in entry.operations}
            if not operations <= {"MergeModulelist", "Concatenate"}:
                return None
            part = entry.source_patterns.index(pattern)
    expert = _EXPERT.search(name)
    return _Place(renamed, None if expert is None else int(expert[1]), part)


def _as_rows(shape: tuple[int, int], layout: ExpertLayout) -> tuple[int, ...]:
    """`[out, in]` of a weight."""
    return (shape[1], shape[0]) if layout.is_transposed else shape


def _stacked(shape: tuple[int, ...], experts: LayerExperts) -> tuple[int, ...]:
    """The shape that the reader of MXFP4 gives all experts of a layer: `[E, in, out]`."""
    return experts.num_experts, shape[-1], shape[-2]
