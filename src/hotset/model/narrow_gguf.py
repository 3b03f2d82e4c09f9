"""GGUF models whose matrices stay as the file has them, on a CPU."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn
from transformers import modeling_gguf_pytorch_utils as transformers_gguf

from hotset.checkpoint.gguf_blocks import FORMS, tiles_of
from hotset.checkpoint.gguf_file import ROPE_FACTORS, GgufFile
from hotset.cost.config_sizes import num_experts
from hotset.errors import ModelError
from hotset.linear import native, tile_product
from hotset.linear.merged import merge_linears
from hotset.linear.narrow import NarrowEmbedding, NarrowLinear, narrow_tiles
from hotset.linear.reads import is_replaceable
from hotset.model.architecture import Architecture
from hotset.model.narrow_linears import narrow_bytes
from hotset.model.weights import make_empty
from hotset.units import GIB

# What transformers does to matrices of these is at most to reorder their rows.
_BY_ROWS = (
    transformers_gguf.TensorProcessor,
    transformers_gguf.LlamaTensorProcessor,
    transformers_gguf.Gemma2TensorProcessor,
    transformers_gguf.NemotronTensorProcessor,
)
_PLAIN = {"F32", "F16", "BF16"}


def why_not_narrow(header: GgufFile, architecture: Architecture) -> str | None:
    """Why a file's matrices are widened on a CPU; None where they can stay as they are."""
    if (problem := why_not_read(header, architecture)) is not None:
        return problem
    if not native.can_compile():
        return "the package llvmlite is not installed (pip install 'hotset[cpu]')"
    for kind in sorted({tensor.tensor_type.name for tensor in header.tensors} & FORMS.keys()):
        if (problem := tile_product.check(FORMS[kind])) is not None:
            return f"this processor's products with {kind} are not right ({problem})"
    return None


def why_not_read(header: GgufFile, architecture: Architecture) -> str | None:
    """Why a file's matrices are widened on any device; None where its rows are the model's."""
    kinds = {tensor.tensor_type.name for tensor in header.tensors}
    if not kinds & FORMS.keys():
        return f"of its types ({', '.join(sorted(kinds))}) none is kept"
    if num_experts(architecture.config.get_text_config()) > 1:
        return "it has experts"
    known = type(header.processor(architecture.config)) in _BY_ROWS
    if header.is_known_to_transformers or not known or not architecture.is_inspected:
        return f"the architecture {header.architecture!r} is not read that way"
    return None


def load_narrow(header: GgufFile, architecture: Architecture, dtype: torch.dtype) -> Any:
    """Make the model of a file on the CPU; `why_not_narrow` said None.

    Takes the bytes that the file has, and one matrix widened or reordered at a time.

    Args:
        header: of the file.
        architecture: makes the model.
        dtype: of what is not narrow.

    Raises:
        ModelError: the file lacks a tensor, or has one of another shape; names it.
    """
    model = make_empty(architecture, dtype)
    tied = is_tied(model)
    names = header.names(model)
    processor = header.processor(architecture.config)
    places = {}
    for tensor in header.tensors:
        if tensor.name != ROPE_FACTORS:
            path, _, name = names[tensor.name].rpartition(".")
            places[tensor.name] = (tensor, path, name)
    for tensor, path, name in sorted(places.values(), key=lambda place: place[2] != "weight"):
        check_shape(header, model, path, name, tensor)
        _put(model, path, name, tensor, processor, dtype)
    if tied:
        _tie(model, next(t for t in header.tensors if t.name == "token_embd.weight"))
    for name, value in model.state_dict().items():
        if value.is_meta:
            raise ModelError(f"{header.path} does not fit its config: {name} is missing")
    merge_linears(model)
    return model


def storage_note(header: GgufFile, model: nn.Module) -> str:
    """A line on what stays as the file has it, and what is widened."""
    by_kind = _in_few_bits(header)
    kept = (sum(tiles.num_bytes for tiles in narrow_tiles(model)) + narrow_bytes(model)) / GIB
    names = ", ".join(sorted(by_kind.keys() & FORMS.keys()))
    line = f"weights: {names} kept as in the file, {kept:.2f} GiB"
    wide = {kind: size for kind, size in by_kind.items() if kind not in FORMS}
    if wide:
        line += "; widened: " + ", ".join(
            f"{kind} ({size / GIB:.2f} GiB in the file)" for kind, size in sorted(wide.items())
        )
    return line


def widening_note(header: GgufFile, why: str) -> str | None:
    """A line on what is widened as it is read, and why; None where nothing is in few bits."""
    by_kind = _in_few_bits(header)
    if not by_kind:
        return None
    kinds = ", ".join(f"{kind} ({size / GIB:.2f} GiB)" for kind, size in sorted(by_kind.items()))
    return f"weights: {kinds} in the file, widened as they are read: {why}"


def check_plain(header: GgufFile, why: str, kept: Collection[str] = ()) -> None:
    """Refuse a file with weights in few bits, which would be widened.

    Args:
        header: of the file.
        why: they would be.
        kept: names of tensors that are not.

    Raises:
        ModelError: it has some; names the first and its bytes.
    """
    wide = [
        tensor
        for tensor in header.tensors
        if tensor.tensor_type.name not in _PLAIN and tensor.name not in kept
    ]
    if not wide:
        return
    first = wide[0]
    raise ModelError(
        f"{header.path}: weights, such as {first.name} with {first.n_bytes:,} bytes in the file, "
        f"cannot stay as they are there: {why}; give allow_widening to widen all "
        f"{sum(tensor.n_bytes for tensor in wide) / 1e9:.2f} GB of them, or another checkpoint"
    )


def _in_few_bits(header: GgufFile) -> dict[str, int]:
    """Bytes of the file's tensors by their type, of types of few bits."""
    by_kind: dict[str, int] = defaultdict(int)
    for tensor in header.tensors:
        if tensor.tensor_type.name not in _PLAIN:
            by_kind[tensor.tensor_type.name] += tensor.n_bytes
    return by_kind


def is_tied(model: Any) -> bool:
    """Whether embeddings and the layer that makes logits share a table."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def check_shape(header: GgufFile, model: Any, path: str, name: str, tensor: Any) -> None:
    """Refuse a tensor of another shape than the model's; ModelError names it."""
    module = model.get_submodule(path)
    # Of a layer that is narrow by now, what is left to come is its bias.
    expected = [module.out_features] if name == "bias" else list(getattr(module, name).shape)
    found = [int(size) for size in reversed(tensor.shape)]
    if expected != found:
        raise ModelError(
            f"{header.path} does not fit its config: tensors of other shapes, first {tensor.name}: "
            f"stored {found}, expected {expected}"
        )


def _put(model: Any, path: str, name: str, tensor: Any, processor: Any, dtype: torch.dtype) -> None:
    """Put a tensor of the file where it belongs, as it is if it can be."""
    module = model.get_submodule(path)
    parent, _, child = path.rpartition(".")
    is_narrow = name == "weight" and tensor.tensor_type.name in FORMS
    if is_narrow and is_replaceable(module):
        tiles = tiles_of(tensor.data, tensor.tensor_type, order_of(tensor, processor))
        bias = None if module.bias is None else module.bias.detach()
        setattr(model.get_submodule(parent), child, NarrowLinear(tiles, bias))
    elif is_narrow and type(module) is nn.Embedding:
        tiles = tiles_of(tensor.data, tensor.tensor_type, order_of(tensor, processor))
        setattr(model.get_submodule(parent), child, NarrowEmbedding(tiles, dtype))
    else:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = processor.process(weights=values, name=tensor.name).weights
        wide = torch.from_numpy(np.array(values)).to(dtype)
        if isinstance(module, NarrowLinear):
            module.bias = wide
        else:
            setattr(module, name, nn.Parameter(wide, requires_grad=False))


def order_of(tensor: Any, processor: Any) -> torch.Tensor | None:
    """The row of the file that is each row of the model's matrix; None is the same."""
    same = np.arange(int(tensor.shape[1]))
    order = processor.process(weights=same[:, None], name=tensor.name).weights[:, 0]
    return None if np.array_equal(order, same) else torch.from_numpy(order.copy())


def _tie(model: Any, table: Any) -> None:
    """Let the layer that makes logits use the table of embeddings, narrow where it can be."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.detach()
    if isinstance(embedding, NarrowEmbedding):
        model.set_output_embeddings(NarrowLinear(embedding.tiles, bias))
    elif table.tensor_type.name in FORMS and is_replaceable(head):
        model.set_output_embeddings(NarrowLinear(tiles_of(table.data, table.tensor_type), bias))
    else:
        head.weight = embedding.weight
