"""Find a model, load it, and say what it is."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from hotset.checkpoint.files import kv_scales, read_config
from hotset.checkpoint.fingerprint import fingerprint
from hotset.checkpoint.quantized import is_dequantised
from hotset.checkpoint.tensors import CheckpointTensors
from hotset.cost.config_sizes import num_experts
from hotset.cost.quantisation import quant_config, stored_format
from hotset.errors import ModelError
from hotset.experts.disk import ExpertSink
from hotset.experts.gating import move_but_experts
from hotset.experts.sizes import slots_hold, why_not_hosted
from hotset.experts.weights import experts_bytes, experts_layers
from hotset.libraries import quiet
from hotset.linear.native import can_compile
from hotset.model import checkpoint
from hotset.model.architecture import Architecture
from hotset.model.cut_model import ModelCutter
from hotset.model.devices import (
    check_room,
    check_rounded_inputs,
    resolve_device,
    resolve_dtype,
)
from hotset.model.find_model import find_model
from hotset.model.finish import closing_on_error, finish, max_model_len
from hotset.model.loaded import LoadedModel, no_tokenizer
from hotset.model.narrow_experts import NarrowExperts, find_narrow_experts
from hotset.model.narrow_linears import narrow_bytes, rounds_inputs
from hotset.option_groups import Activations
from hotset.parallel.group import current
from hotset.units import GIB


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `load_model` was asked for; see there.

    Attributes:
        name: short.
        target: where the model is to run.
        dtype: by its name.
        torch_dtype: None for the checkpoint's own.
    """

    name: str
    target: torch.device
    dtype: str
    torch_dtype: torch.dtype | None
    experts_on_host: bool
    experts: ExpertSink | None
    check: Callable[[PreTrainedModel], None] | None
    needs_tokenizer: bool
    allow_widening: bool
    input_bits: Literal[16, 8]

    @property
    def first_device(self) -> torch.device:
        """Where weights are read to that are not read in place; parts are left of whole ones."""
        is_whole = current().size > 1
        return torch.device("cpu") if self.experts_on_host or is_whole else self.target


def load_model(
    name: str | None,
    *,
    device: str,
    dtype: str,
    experts_on_host: bool = False,
    experts: ExpertSink | None = None,
    check: Callable[[PreTrainedModel], None] | None = None,
    needs_tokenizer: bool = False,
    allow_widening: bool = False,
    activations: Activations = "16",
) -> LoadedModel:
    """Load a model for inference. Prints to stderr only what is downloaded or converted.

    Args:
        name: None for the default model; a folder with `config.json` and safetensors weights;
            a `.gguf` file, which a CPU keeps as it is where it can; or a hub id.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on the CPU, the checkpoint's own elsewhere), `float32`,
            `bfloat16`, `float16`, or `fp8`: bfloat16, but 8-bit weights in linear layers.
        experts_on_host: leave the weights of experts, where the model has some, in host memory, for
            `buffer_experts`.
        experts: with `experts_on_host`, takes the experts that host memory has no room for. Experts
            of a GGUF file are in memory first.
        check: gets the model on `meta`, before a weight is read, and raises where it does not fit
            what the caller has in mind. Not called for a GGUF file.
        needs_tokenizer: refuse a model without one, before a weight is read.
        allow_widening: widen experts, and matrices of a GGUF file, that a checkpoint has in few
            bits and that cannot stay so, instead of refusing the model. Without it a CPU of one
            rank widens them too, but not experts in host memory of other files.
        activations: `8` rounds what weights in 8-bit floats are multiplied with.

    Raises:
        ModelError: the model cannot be found, read or run, or does not fit into free memory.
            Nothing stays in memory.
        ConfigError: there is no such device; or as `ExpertSink.begin` and `check` say.
        TierError: the disk for experts cannot be used.
    """
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    if activations == "8":
        check_rounded_inputs(target, dtype)
    why_wide = _why_gguf_is_wide(target, dtype)
    source, short_name = find_model(name, narrow=_prefers_gguf(target, why_wide))
    architecture = None if source.is_file() else checkpoint.read_architecture(source)
    if architecture is not None and num_experts(architecture.config.get_text_config()) <= 1:
        experts_on_host = False
    where = (target, dtype, torch_dtype, experts_on_host, experts)
    bits: Literal[16, 8] = 8 if activations == "8" else 16
    asked = _Asked(short_name, *where, check, needs_tokenizer, allow_widening, bits)
    with closing_on_error(experts), quiet():
        model, tokenizer, architecture, note, cutter = _read(source, architecture, asked, why_wide)
    notes = finish(model, dtype, architecture)
    _cut_whole(model, cutter, target)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=short_name,
        fingerprint=_fingerprint(source, dtype, activations),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        max_model_len=max_model_len(model, tokenizer, short_name),
        kv_scales=kv_scales(source, model.config.get_text_config().num_hidden_layers),
        notes=(*notes, *([] if note is None else [note])),
    )


def _cut_whole(model: PreTrainedModel, cutter: ModelCutter, target: torch.device) -> None:
    """Leave what was read whole with this rank's part, on its device."""
    cutter.cut_all(model)
    if not cutter.is_idle and model.device != target:  # whole weights were read to the CPU
        model.to(target)
    cutter.join_outputs(model)


def _read(
    source: Path, architecture: Architecture | None, asked: _Asked, why_wide: str | None
) -> tuple[PreTrainedModel, Any, Architecture, str | None, ModelCutter]:
    """The model, its tokenizer, what it is, what to say of its weights, and what cuts it.

    Of a folder of this architecture, or of a GGUF file, where that is None.
    """
    if architecture is None:
        if asked.input_bits == 8:
            raise _not_rounded(asked.name)
        model, tokenizer, architecture, note = checkpoint.load_gguf(
            source,
            asked.first_device,
            asked.torch_dtype,
            why_wide=why_wide,
            allow_widening=asked.allow_widening or asked.dtype == "fp8",
            on_gpu=asked.target.type == "cuda",
        )
        cutter = ModelCutter(model, asked.name)
    else:
        model, tokenizer, note, cutter = _load_folder(source, architecture, asked)
    if asked.experts_on_host:
        move_but_experts(model, asked.target)
    return model, tokenizer, architecture, note, cutter


def _load_folder(
    source: Path, architecture: Architecture, asked: _Asked
) -> tuple[PreTrainedModel, Any, str | None, ModelCutter]:
    """The model of a folder, its tokenizer, what to say of its weights, and what cut it."""
    outline = architecture.outline(asked.torch_dtype or architecture.dtype or torch.float32)
    cutter = ModelCutter(outline, asked.name)
    narrow = _narrow_experts(source, architecture, outline, cutter, asked)
    cutter.cut_all(outline)
    if asked.check is not None:
        asked.check(outline)
    _check_room(architecture, outline, asked, narrow)
    tokenizer = checkpoint.load_tokenizer(source)
    if tokenizer is None and asked.needs_tokenizer:
        raise no_tokenizer(asked.name)
    model = checkpoint.load_folder(
        source,
        architecture,
        asked.first_device,
        asked.torch_dtype,
        fp8=asked.dtype == "fp8" and not asked.experts_on_host,
        experts=asked.experts,
        narrow=narrow,
        cutter=cutter,
        in_place=asked.first_device if asked.experts_on_host else asked.target,
        input_bits=asked.input_bits,
    )
    if asked.input_bits == 8 and narrow is None and not narrow_bytes(model):
        raise _not_rounded(asked.name)
    return model, tokenizer, _storage_note(architecture, model, narrow), cutter


def _narrow_experts(
    source: Path,
    architecture: Architecture,
    outline: PreTrainedModel,
    cutter: ModelCutter,
    asked: _Asked,
) -> NarrowExperts | None:
    """The experts that stay as the checkpoint has them; `outline` is told so.

    None where it has none in few bits, or they are to be rounded otherwise or widened.

    Raises:
        ModelError: they would be widened, and that is not allowed.
    """
    on_host, experts = asked.experts_on_host, asked.experts
    is_rounded = on_host and not (experts is not None and experts.keeps_narrow)
    if is_rounded or quant_config(architecture.fields) is None:
        return None
    tensors = CheckpointTensors(source, architecture.fields, input_bits=asked.input_bits)
    stored = {n: size for n, size in tensors.dequantised_bytes.items() if ".experts." in n}
    if not stored:
        return None
    narrow, why_not = None, why_not_hosted(outline)
    if not why_not:
        place = None if on_host else asked.target
        narrow = find_narrow_experts(outline, tensors, place, cutter.slice_of)
        why_not = _why_not_kept(tensors, narrow, outline, asked)
    if narrow is not None and not why_not:
        narrow.mark(outline)
        return narrow
    on_cpu_alone = asked.target.type == "cpu" and not on_host  # where all are widened
    if asked.allow_widening or on_cpu_alone:
        return None
    name, size = next(iter(sorted(stored.items())))
    wide = str(outline.dtype).removeprefix("torch.")
    raise ModelError(
        f"{asked.name}: experts, such as {name} with {size:,} bytes in the files, cannot stay as "
        f"they are there: {why_not}; in {wide} all of them take {experts_bytes(outline) / 1e9:.2f} "
        f"GB in place of {sum(stored.values()) / 1e9:.2f}; give allow_widening for that, or "
        "another checkpoint"
    )


def _why_not_kept(
    tensors: CheckpointTensors,
    narrow: NarrowExperts | None,
    outline: PreTrainedModel,
    asked: _Asked,
) -> str:
    """What keeps experts from staying as they are stored; empty where nothing does."""
    if tensors.narrow_format is None:
        return "their numbers are stored in a form that is only read to be widened"
    if narrow is None:
        return (
            "layers differ in it, have their values in another order than the model, or slices of "
            "several GPUs end within a byte"
        )
    # A CPU widens what it has in slots.
    on_cpu = asked.experts_on_host and asked.target.type == "cpu"
    if not on_cpu and not slots_hold(experts_layers(outline)[0], narrow.narrow, asked.target):
        return f"no kernel computes this model's experts in {narrow.narrow.name} on {asked.target}"
    return ""


def _check_room(
    architecture: Architecture,
    outline: PreTrainedModel,
    asked: _Asked,
    narrow: NarrowExperts | None,
) -> None:
    """Refuse weights that cannot fit, before they are read; experts in host memory do not count.

    Those may go to disk, or have fewer bits there. With fp8, and by most quantisers, all take less.
    """
    fields = architecture.fields
    if asked.dtype == "fp8" or (quant_config(fields) is not None and not is_dequantised(fields)):
        return
    if asked.target.type == "cuda" and is_dequantised(fields) and narrow is None:
        return  # linear layers may stay in few bits
    num_bytes = sum(parameter.nbytes for parameter in outline.parameters())
    if asked.experts_on_host or narrow is not None:
        num_bytes -= experts_bytes(outline)
    if narrow is not None and not asked.experts_on_host:
        num_bytes += narrow.num_bytes(outline)
    check_room(num_bytes, asked.target, asked.name, outline.dtype)


def _storage_note(
    architecture: Architecture, model: PreTrainedModel, narrow: NarrowExperts | None
) -> str | None:
    """A line on what a quantised checkpoint has in few bits, and what becomes of it."""
    if not is_dequantised(architecture.fields):
        return None
    stored = stored_format(quant_config(architecture.fields) or {})
    what = "narrow weights" if stored is None else stored.name
    wide = str(model.dtype).removeprefix("torch.")
    if kept := narrow_bytes(model):
        return (
            f"weights: linear layers are kept as {what}, as in the files, {kept / GIB:.2f} GiB"
            f"{rounds_inputs(model) * ', and multiplied with inputs in 8 bits'}; other {what} "
            f"there is widened to {wide}"
        )
    if narrow is None:
        return f"weights: {what} in the files, widened to {wide} as they are read"
    return (
        f"weights: experts are kept as {narrow.narrow.name}, as in the files; what else is {what} "
        f"there is widened to {wide}"
    )


def _why_gguf_is_wide(target: torch.device, dtype: str) -> str | None:
    """Why the matrices of a GGUF file are widened; None where they are kept, if they can be."""
    if dtype == "fp8":
        return "they are rounded to fp8"
    if current().size > 1:
        return "each of several ranks has a part of every matrix"
    return None


def _prefers_gguf(target: torch.device, why_wide: str | None) -> bool:
    """Whether a model that is there in both forms is read from its GGUF file."""
    return target.type == "cpu" and why_wide is None and can_compile()


def _not_rounded(name: str) -> ModelError:
    return ModelError(
        f"{name}: activations is 8, but none of its weights stay as 8-bit floats of a checkpoint "
        "in FP8, whose inputs could be rounded; leave activations out"
    )


def fingerprint_of(
    name: str | None, *, device: str, dtype: str, activations: Activations = "16"
) -> str:
    """The fingerprint that `load_model` gives a model, without loading a weight.

    Raises:
        ModelError: the model cannot be found or read.
        ConfigError: there is no such device.
    """
    target = resolve_device(device)
    source, _ = find_model(name, narrow=_prefers_gguf(target, _why_gguf_is_wide(target, dtype)))
    if source.is_dir():
        read_config(source)  # raises for a folder that holds no model
    return _fingerprint(source, dtype, activations)


def _fingerprint(source: Path, dtype: str, activations: Activations) -> str:
    """Of the weights as they are used, and of what is rounded to use them."""
    made = fingerprint(source)
    rounded = [" fp8"] * (dtype == "fp8") + [" inputs fp8"] * (activations == "8")
    for each in rounded:
        made = hashlib.blake2b(f"{made}{each}".encode(), digest_size=16).hexdigest()
    return made


def _eos_token_ids(model: Any, tokenizer: Any | None) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for holder in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        for token_id in ids if isinstance(ids, list | tuple) else [ids]:
            if token_id is None:
                continue
            if not isinstance(token_id, int):
                raise ModelError(
                    f"the {type(holder).__name__} of the model has eos_token_id {ids!r}; expected "
                    "a token id or a list of them"
                )
            found[token_id] = None
    return tuple(found)
