"""Weights from safetensors files straight to their place, one tensor at a time.

`from_pretrained` of transformers makes a tensor for each name; where layers are merged or rounded
afterwards, both forms are in memory for a while, and the allocator keeps what is freed. Here the
model is made without memory, merged and prepared for 8-bit weights, then allocated once, and each
tensor of the files goes into its rows.
"""

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from hotset.checkpoint import leftovers
from hotset.checkpoint.tensors import CheckpointTensors
from hotset.cost.quantisation import quant_config
from hotset.errors import ModelError
from hotset.linear.fp8_linear import Fp8Linear, quantize_linears
from hotset.linear.merged import MergedLinear, merge_linears
from hotset.model.architecture import Architecture
from hotset.model.cut_model import ModelCutter
from hotset.model.narrow_linears import fill_linears, narrow_form, replace_linears
from hotset.parallel.parts import Part

_NUM_THREADS = 4  # each holds one tensor; they wait for the disk and the link


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint belongs: a parameter or buffer, or rows of it.

    Attributes:
        part: of the tensor, that this rank has; None is all.
    """

    module: nn.Module
    name: str
    rows: slice | None
    part: Part | None

    @torch.no_grad()
    def fill(self, tensor: Any) -> None:
        """Read the part of a tensor of the file into its place."""
        target = getattr(self.module, self.name)
        rows, part = self.rows or slice(None), self.part
        if isinstance(self.module, Fp8Linear) and self.name == "weight":
            if part is None or part.dim == 0:
                self.module.set_rows(rows, _read(tensor, part).to(target.device))
            else:  # whole rows, as these have scales
                self.module.set_rows(rows, tensor[...].to(target.device), *part.slices)
        else:
            part_read = _read(tensor, part).to(target.device)
            (target if self.rows is None else target[self.rows]).copy_(part_read)


def _read(tensor: Any, part: Part | None) -> torch.Tensor:
    """A part of a tensor of a file, or all of it."""
    read: torch.Tensor = tensor[...] if part is None else part.of(tensor)
    return read


def load_in_place(
    architecture: Architecture,
    tensors: CheckpointTensors,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fp8: bool,
    cutter: ModelCutter | None = None,
) -> Any | None:
    """Make the model of `architecture` on `device`, its sibling layers merged.

    Takes the bytes of the model, and a tensor for each of a few threads.

    Args:
        architecture: makes the model.
        tensors: of the checkpoint.
        device: where the weights go.
        dtype: of what is not 8-bit.
        fp8: store the weights of linear layers in 8 bits; see `fp8_linear.can_be_fp8`.
        cutter: leaves layers with this rank's part, which alone is read; None cuts nothing.

    Returns:
        The model; None where the tensors of the files are not those of the model as they are:
        stacked, split, missing, of other shapes, or quantised in a way that `tensors` does not
        read. `from_pretrained` knows more then.

    Raises:
        ModelError: the files hold a tensor that the model has no place for, and answers may depend
            on it. Also whatever a damaged file makes safetensors raise, and
            `torch.OutOfMemoryError`.
    """
    is_quantised = quant_config(architecture.fields) is not None and not tensors.is_dequantised
    if is_quantised or not architecture.is_inspected:
        return None
    model = make_empty(architecture, dtype)
    if not _is_as_stored(model, tensors):
        return None
    _check_leftovers(model, architecture.fields, tensors)
    parts = {} if cutter is None else cutter.cut_all(model)
    form = None if fp8 else narrow_form(tensors, device, dtype)
    kept: list[str] = []
    if form is not None:
        narrow, shapes = tensors.narrow_names, tensors.shapes
        if cutter is not None:
            narrow -= cutter.head_weights
        kept = replace_linears(model, form, {name: shapes[name] for name in narrow}, parts)
    if fp8:
        quantize_linears(model)
    merge_linears(model)
    allocate(model, device)
    places = places_of(model, parts)
    with tensors.open(device, dtype, without=kept) as reads:
        _fill(reads, places)
    if kept:
        with tensors.open_narrow(device) as read:
            fill_linears(model, kept, read, parts)
    read_generation_config(model, tensors.folder)
    return model


def make_empty(architecture: Architecture, dtype: torch.dtype) -> Any:
    """The model with its weights on `meta`, tied ones the same, and its buffers computed."""
    with accelerate.init_empty_weights():  # buffers, which are computed, are made
        model: Any = architecture.make(dtype, attn_implementation=architecture.attention)
    _compute_buffers(model)
    model.tie_weights()
    return model


def _compute_buffers(model: Any) -> None:
    """Compute what no checkpoint holds, such as rotations, as `from_pretrained` does.

    Models that are made in a narrow dtype compute it in that; initialising them again does not.
    The weights are on `meta`, and stay as they are.
    """
    for module in model.modules():
        if module._non_persistent_buffers_set:
            module._is_hf_initialized = False
    model.initialize_weights()


def read_generation_config(model: Any, folder: Path) -> None:
    """Give a model the generation config of its folder, if there is one."""
    with contextlib.suppress(OSError):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)


def _is_as_stored(model: Any, tensors: CheckpointTensors) -> bool:
    """Whether each weight, or a weight it is tied to, is in the files under its name."""
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return False  # not all of one dtype
    if any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(model)):
        return False  # values are moved, even where names and shapes stay
    found: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names = found.setdefault(id(tensor), [])
        if name not in tensors.stored:
            continue
        if tensors.stored[name].shape != tuple(tensor.shape) or not tensors.is_float(name):
            return False
        names.append(name)
    # Tied weights that are stored twice need not be equal, whatever the config says.
    return all(names and _all_equal(names, tensors) for names in found.values())


def _all_equal(names: list[str], tensors: CheckpointTensors) -> bool:
    if len(names) == 1:
        return True
    with tensors.open(torch.device("cpu"), torch.float32) as reads:
        first = reads[names[0]][...]
        return all(torch.equal(first, reads[name][...]) for name in names[1:])


def _check_leftovers(model: Any, fields: Mapping[str, Any], tensors: CheckpointTensors) -> None:
    """Refuse tensors that the model has no place for, unless no answer depends on them."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    shapes = {}
    for name in tensors.stored.keys() - model.state_dict().keys():
        if tensors.is_zero_bias(name):
            continue
        renamed = name  # as the patterns of what the model ignores have it
        for entry in renamings:
            renamed, _ = entry.rename_source_key(renamed)
        shapes[renamed] = tensors.stored[name].shape
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    if names := leftovers.leftovers(shapes, shapes, fields, ignored):
        problem = leftovers.leftovers_problem(names)
        raise ModelError(f"{tensors.folder} does not fit its config: {problem}")


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give each parameter its memory, tied ones the same; move the buffers."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                memory = torch.empty_like(parameter, device=device)
                made[id(parameter)] = nn.Parameter(memory, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def places_of(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Place]:
    """The place of each tensor by the name it has in a checkpoint, and which part goes there."""
    places = {}
    wholes = {id(module.whole) for module in model.modules() if isinstance(module, MergedLinear)}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in wholes:
            continue
        owner, rows = module, None
        if isinstance(module, MergedLinear):
            owner, rows = module.whole, module.columns
        for name in (*owner._parameters, *owner._buffers):
            if getattr(owner, name) is not None and name not in owner._non_persistent_buffers_set:
                whole = f"{path}.{name}" if path else name
                places[whole] = Place(owner, name, rows, parts.get(whole))
    return places


def _fill(reads: Mapping[str, Any], places: Mapping[str, Place]) -> None:
    with ThreadPoolExecutor(_NUM_THREADS) as pool:

        def move(name: str) -> None:
            places[name].fill(reads[name])

        for _ in pool.map(move, [name for name in reads if name in places]):
            pass
