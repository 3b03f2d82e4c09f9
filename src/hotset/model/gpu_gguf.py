"""GGUF models whose matrices stay in few bits on a GPU: opened to planes, without loss."""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from hotset.checkpoint.gguf_blocks import FORMS, planes_of, weight_format
from hotset.checkpoint.gguf_file import ROPE_FACTORS, GgufFile
from hotset.errors import ModelError
from hotset.linear import quant_linear
from hotset.linear.merged import MergedLinear, merge_linears
from hotset.linear.quant_linear import QuantEmbedding, QuantLinear, quant_matrix
from hotset.linear.reads import is_replaceable
from hotset.model import narrow_gguf
from hotset.model.architecture import Architecture
from hotset.model.weights import Place, allocate, make_empty, places_of

_NUM_THREADS = 4  # each opens a matrix


def why_not_narrow(
    header: GgufFile, architecture: Architecture, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a file's matrices are widened on a GPU; None where they can stay in few bits."""
    if (problem := narrow_gguf.why_not_read(header, architecture)) is not None:
        return problem
    if dtype not in (torch.bfloat16, torch.float16):
        return f"no kernel of a GPU multiplies them in {str(dtype).removeprefix('torch.')}"
    for kind in sorted({tensor.tensor_type.name for tensor in header.tensors} & FORMS.keys()):
        if (problem := quant_linear.check(weight_format(kind), dtype, device)) is not None:
            return f"this GPU's products with {kind} are not right ({problem})"
    return None


def load_narrow(
    header: GgufFile,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    *,
    allow_widening: bool,
) -> Any:
    """Make the model of a file on a GPU; `why_not_narrow` said None.

    Takes the bytes of the model, and a few matrices on the host at a time.

    Args:
        header: of the file.
        architecture: makes the model.
        device: where the weights go.
        dtype: of what is not narrow.
        allow_widening: of matrices in few bits that cannot stay so.

    Raises:
        ModelError: the file lacks a tensor, has one of another shape, or one that would be widened;
            names it.
    """
    model = make_empty(architecture, dtype)
    names, processor = header.names(model), header.processor(architecture.config)
    tensors = {names[t.name]: t for t in header.tensors if t.name != ROPE_FACTORS}
    for path, tensor in tensors.items():
        owner, _, name = path.rpartition(".")
        narrow_gguf.check_shape(header, model, owner, name, tensor)
    kept = _replace(model, tensors, dtype)
    if not allow_widening:
        narrow_gguf.check_plain(header, _WHY_WIDE, {tensors[path].name for path in kept})
    merge_linears(model)
    allocate(model, device)
    places = places_of(model, {})
    if (missing := _missing(places, kept, tensors)) is not None:
        raise ModelError(f"{header.path} does not fit its config: {missing} is missing")

    def move(path: str) -> None:
        tensor = tensors[path]
        if path in kept:
            _fill(model.get_submodule(path.removesuffix(".weight")), tensor, processor, device)
            return
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = processor.process(weights=values, name=tensor.name).weights
        places[path].fill(torch.from_numpy(np.array(values)))

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for _ in pool.map(move, tensors):
            pass
    return model


_WHY_WIDE = "no kernel of a GPU multiplies matrices of its type, or the model reads them otherwise"


def _replace(model: Any, tensors: dict[str, Any], dtype: torch.dtype) -> set[str]:
    """Put layers and embeddings of few bits into a model on `meta`; which weights they are of."""
    is_tied = narrow_gguf.is_tied(model)
    head = model.get_output_embeddings()
    kept, meta = set(), torch.device("meta")
    for path, tensor in tensors.items():
        owner, _, name = path.rpartition(".")
        if name != "weight" or tensor.tensor_type.name not in FORMS:
            continue
        module = model.get_submodule(owner)
        parent, _, child = owner.rpartition(".")
        narrow: nn.Module
        matrix = quant_matrix(weight_format(tensor.tensor_type.name), tuple(module.weight.shape))
        if is_replaceable(module):
            narrow = _linear(module, matrix)
        elif type(module) is nn.Embedding and (not is_tied or is_replaceable(head)):
            narrow = QuantEmbedding(matrix, dtype, device=meta)
        else:
            continue
        setattr(model.get_submodule(parent), child, narrow)
        kept.add(path)
        if is_tied and isinstance(narrow, QuantEmbedding):
            shared = _linear(head, matrix)
            shared.payload = narrow.payload
            model.set_output_embeddings(shared)
    return kept


def _missing(
    places: Mapping[str, Place], kept: Collection[str], tensors: Collection[str]
) -> str | None:
    """The name of a weight that the file lacks, and that is tied to none it has."""
    there = {f"{path.removesuffix('weight')}payload" for path in kept}
    there |= set(tensors) - set(kept)
    filled = {id(getattr(places[name].module, name.rpartition(".")[2])) for name in there}
    for name, place in places.items():
        is_buffer = place.name in place.module._buffers  # computed, where no file has it
        is_tied = place.rows is None and id(getattr(place.module, place.name)) in filled
        if name not in there and not is_tied and not is_buffer:
            return name
    return None


def _linear(module: nn.Linear, matrix: Any) -> QuantLinear:
    bias_dtype = None if module.bias is None else module.bias.dtype
    return QuantLinear(matrix, bias_dtype=bias_dtype, device=torch.device("meta"))


def _fill(module: nn.Module, tensor: Any, processor: Any, device: torch.device) -> None:
    planes = planes_of(tensor.data, tensor.tensor_type, narrow_gguf.order_of(tensor, processor))
    codes, scales, more = planes
    planes = codes.to(device), scales.to(device), None if more is None else more.to(device)
    if isinstance(module, MergedLinear):
        assert isinstance(module.whole, QuantLinear)
        module.whole.set_rows(module.columns, planes)
    else:
        assert isinstance(module, QuantLinear | QuantEmbedding)
        module.set_rows(slice(None), planes)
