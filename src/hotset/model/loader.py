"""Find a model, load it, and say what it is."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import torch
from transformers import AutoConfig, PreTrainedModel

from hotset.cgroups import available_host_bytes
from hotset.checkpoint.files import kv_scales, read_config
from hotset.checkpoint.fingerprint import fingerprint
from hotset.checkpoint.quantized import is_dequantised
from hotset.cost.catalog import find_config
from hotset.cost.config_sizes import context_length, largest, num_experts
from hotset.cost.quantisation import quant_config
from hotset.errors import ConfigError, ModelError, PlanError
from hotset.executor.probe import inspect_model
from hotset.experts.disk import ExpertSink
from hotset.experts.gating import experts_layers, move_but_experts
from hotset.experts.router_skew import skew_routers
from hotset.foreign_text import parse_json
from hotset.libraries import first_line, quiet
from hotset.linear.fp8 import FP8
from hotset.linear.fp8_linear import quantize_linears
from hotset.model import checkpoint
from hotset.model.architecture import Architecture, find_architecture, known_fields
from hotset.model.find_model import find_model
from hotset.model.loaded import LoadedModel, no_tokenizer

_log = logging.getLogger(__name__)


def load_model(
    name: str | None,
    *,
    device: str,
    dtype: str,
    experts_on_host: bool = False,
    experts: ExpertSink | None = None,
    check: Callable[[PreTrainedModel], None] | None = None,
    needs_tokenizer: bool = False,
) -> LoadedModel:
    """Load a model for inference. Prints to stderr only what is downloaded or converted.

    Args:
        name: None for the default model; a folder with `config.json` and safetensors weights;
            a `.gguf` file, which is dequantised; or a hub id.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on the CPU, the checkpoint's own elsewhere), `float32`,
            `bfloat16`, `float16`, or `fp8`: bfloat16, but 8-bit weights in linear layers.
        experts_on_host: leave the weights of experts, where the model has some, in host memory, for
            `buffer_experts`.
        experts: with `experts_on_host`, where those go that host memory has no room for. Of a
            GGUF file they are in memory first.
        check: gets the model on `meta`, before a weight is read, and raises where it does not fit
            what the caller has in mind. Not of a GGUF file.
        needs_tokenizer: refuse a model without one, before a weight is read.

    Raises:
        ModelError: the model cannot be found, read or run, or is larger than the memory that is
            free; nothing stays in memory.
        ConfigError: there is no such device; or as `ExpertSink.begin` and `check` say.
        TierError: the disk for experts cannot be used.
    """
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    source, short_name = find_model(name)
    architecture = None if source.is_file() else checkpoint.read_architecture(source)
    experts_on_host = experts_on_host and _may_have_experts(source)
    if architecture is not None:
        outline = architecture.outline(torch_dtype or architecture.dtype or torch.float32)
        if check is not None:
            check(outline)
        # What a quantiser leaves, and 8-bit layers, take less than the outline has.
        fields = architecture.fields
        is_as_outlined = quant_config(fields) is None or is_dequantised(fields)
        if dtype != "fp8" and is_as_outlined:
            _check_room(outline, target, short_name, experts_on_host=experts_on_host)
        with quiet():
            tokenizer = checkpoint.load_tokenizer(source)
        if tokenizer is None and needs_tokenizer:
            raise no_tokenizer(short_name)
    first = torch.device("cpu") if experts_on_host else target
    with quiet(), _closing_on_error(experts):
        if architecture is None:
            model, tokenizer = checkpoint.load_gguf(source, first, torch_dtype)
        else:
            in_place = dtype == "fp8" and not experts_on_host
            model = checkpoint.load_folder(
                source, architecture, first, torch_dtype, fp8=in_place, experts=experts
            )
        if experts is not None:
            experts.finish(model)
    if experts_on_host:
        move_but_experts(model, target)
    if architecture is None:  # of a GGUF file
        architecture = find_architecture(model.config, str(source), {})
    _round(model, dtype, architecture)
    model.eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=short_name,
        fingerprint=_fingerprint(source, dtype),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        max_model_len=_max_model_len(model, tokenizer, short_name),
        kv_scales=kv_scales(source, model.config.get_text_config().num_hidden_layers),
        notes=(*architecture.notes, *_context_notes(model)),
    )


def _check_room(
    outline: PreTrainedModel, target: torch.device, name: str, *, experts_on_host: bool
) -> None:
    """Refuse weights that cannot fit, before they are read; experts in host memory do not count.

    Those may go to disk, or have fewer bits there.
    """
    num_bytes = sum(parameter.nbytes for parameter in outline.parameters())
    if experts_on_host:
        experts = (weight for layer in experts_layers(outline) for weight in layer.parameters())
        num_bytes -= sum(weight.nbytes for weight in experts)
    if num_bytes > (free_bytes := _free_bytes(target)):
        raise ModelError(
            f"the weights of {name} in {str(outline.dtype).removeprefix('torch.')} take "
            f"{num_bytes / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free on {target}; take a "
            "smaller model or a narrower dtype, or give this process more memory"
        )


def fingerprint_of(name: str | None, dtype: str) -> str:
    """What `load_model` gives as the model's fingerprint, without loading a weight.

    Raises:
        ModelError: the model cannot be found or read.
    """
    source, _ = find_model(name)
    if source.is_dir():
        read_config(source)  # names what is no model
    return _fingerprint(source, dtype)


@contextlib.contextmanager
def _closing_on_error(experts: ExpertSink | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if experts is not None:
            experts.close()
        raise


def load_dummy(
    name: str,
    *,
    device: str,
    dtype: str,
    seed: int = 0,
    router_skew: float | None = None,
    experts_on_host: bool = False,
    experts: ExpertSink | None = None,
) -> LoadedModel:
    """A model of a known shape with random weights and no tokenizer, for benchmarks.

    Each weight is made on the device in its dtype, so none is in memory twice. Initial values are
    those that transformers gives a model to be trained, and equal seeds give equal weights.

    Args:
        name: a bundled name of `hotset plan`, a folder with `config.json`, such a file, or the id
            of a model whose config is in the local hub cache.
        device: as for `load_model`.
        dtype: as for `load_model`; `auto` off the CPU is the config's own, else bfloat16.
        seed: of the weights.
        router_skew: how unevenly routers use the experts, see `router_skew.skew_routers`; None
            leaves that to chance.
        experts_on_host: as for `load_model`; the weights are the same.
        experts: as for `load_model`.

    Raises:
        ModelError: there is no such config, transformers cannot make a causal language model of
            it, or its weights are larger than the memory that is free; `ConfigError`: there is no
            such device or dtype, or nothing to be skewed; `TierError`: as for `load_model`.
    """
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    try:
        fields, short_name, source = find_config(name)
    except PlanError as error:
        raise ModelError(str(error)) from error
    if (file := Path(source)).is_file():
        short_name = file.resolve().parent.name if file.name == "config.json" else file.stem
    try:
        config = AutoConfig.for_model(**known_fields(fields, source))
    except ModelError:
        raise
    except Exception as error:  # whatever a config that does not fit makes the libraries raise
        raise ModelError(f"cannot make a model of {source}: {first_line(error)}") from error
    architecture = find_architecture(config, source, fields)
    torch_dtype = torch_dtype or architecture.dtype or torch.bfloat16
    shape = architecture.outline(torch_dtype)
    weights_bytes = sum(parameter.nbytes for parameter in shape.parameters())
    experts_bytes = 0
    if experts_on_host:
        stacked = [weight for layer in experts_layers(shape) for weight in layer.parameters()]
        experts_bytes = sum(weight.nbytes for weight in stacked)
        if experts is not None:
            experts.begin(shape)
            if experts.store is not None:
                weights_bytes -= experts_bytes - experts.store.host_bytes
                experts_bytes = experts.store.host_bytes
    # On the CPU the two are the same memory.
    here_bytes = weights_bytes if target.type == "cpu" else weights_bytes - experts_bytes
    for num_bytes, where in ((here_bytes, target), (experts_bytes, torch.device("cpu"))):
        if num_bytes > (free_bytes := _free_bytes(where)):
            if experts is not None:
                experts.close()
            raise ModelError(
                f"the weights of {short_name} in {torch_dtype} take {num_bytes / 1e9:.1f} GB and "
                f"{free_bytes / 1e9:.1f} GB are free on {where}; take a smaller shape or a "
                "narrower dtype"
            )
    devices = [target] if target.type == "cuda" else []
    with (
        _closing_on_error(experts),
        quiet(),
        torch.random.fork_rng(devices),
        torch.device(target),
    ):
        torch.manual_seed(seed)
        model = _make(
            architecture, torch_dtype, target, experts_on_host=experts_on_host, experts=experts
        )
    if router_skew is not None:
        skew_routers(model, router_skew, seed=seed)
    _round(model, dtype, architecture)
    model.eval().requires_grad_(False)
    made_of = json.dumps(
        [fields, dtype, str(model.dtype), seed, router_skew], sort_keys=True, default=str
    )
    return LoadedModel(
        model=model,
        tokenizer=None,
        name=short_name,
        fingerprint=hashlib.blake2b(made_of.encode(), digest_size=16).hexdigest(),
        eos_token_ids=(),
        max_model_len=_max_model_len(model, None, short_name),
        notes=(*architecture.notes, *_context_notes(model)),
    )


def _make(
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    *,
    experts_on_host: bool,
    experts: ExpertSink | None,
) -> Any:
    """What `from_config` makes; with experts on the host, one layer's at a time on the device."""
    with accelerate.init_empty_weights(include_buffers=False):
        model: Any = architecture.make(dtype)
    layers = {id(layer) for layer in experts_layers(model)}
    to_disk = experts if experts is not None and experts.store is not None else None

    def make(module: torch.nn.Module, owner: PreTrainedModel) -> None:
        # In the order of transformers' `initialize_weights`.
        for child in module.children():
            make(child, child if isinstance(child, PreTrainedModel) else owner)
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty_like(weight, device=device)
                module._parameters[name] = torch.nn.Parameter(empty)
        module._is_hf_initialized = False  # type: ignore[assignment]
        owner._initialize_weights(module)
        if to_disk is not None and id(module) in layers:
            to_disk.take(module)
        elif experts_on_host and id(module) in layers:
            module._apply(lambda tensor: tensor.to("cpu"), recurse=False)

    with torch.no_grad():
        make(model, model)
    if to_disk is not None:
        to_disk.finish(model)
    if experts_on_host:
        move_but_experts(model, device)  # biases and the like
    model.tie_weights()
    return model


def resolve_device(device: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device this machine has."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device is {device!r}; expected auto, cpu or cuda") from None
    if target.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; expected auto, cpu or cuda")
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device is 'cuda' but torch finds no NVIDIA GPU here; use cpu")
        count = torch.cuda.device_count()
        if (target.index or 0) >= count:
            raise ConfigError(f"device is {device!r} but this machine has {count} GPUs")
    return target


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """The torch dtype asked for; None is the checkpoint's own."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    names = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "fp8": torch.bfloat16,  # of what is not a weight of a linear layer
    }
    if dtype not in names:
        raise ConfigError(f"dtype is {dtype!r}; expected auto, {', '.join(names)}")
    if dtype == "fp8":
        _require_fp8("dtype", device)
    return names[dtype]


def resolve_kv_dtype(kv_dtype: str, device: torch.device) -> torch.dtype | None:
    """What keys and values are stored in; None is the model's dtype.

    Raises:
        ConfigError: the GPU has no such numbers.
    """
    if kv_dtype == "auto":
        return None
    _require_fp8("kv_dtype", device)
    return FP8


def _may_have_experts(source: Path) -> bool:
    """Whether a folder's config counts experts; True for a GGUF file, whose header is not read."""
    if source.is_file():
        return True
    try:
        config = parse_json((source / "config.json").read_bytes())
    except (OSError, ValueError):
        return False  # loading it says what is wrong
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    named = [SimpleNamespace(**part) for part in parts if isinstance(part, dict)]
    return any(num_experts(part) > 1 for part in named)


def _round(model: Any, dtype: str, architecture: Architecture) -> None:
    """Round the weights of linear layers, where `dtype` asks for it and they are not yet."""
    if dtype != "fp8":
        return
    architecture.mark_read_layers(model)
    if not architecture.is_inspected:
        inspect_model(model)  # marks them too
    quantize_linears(model)
    if experts_layers(model):
        _log.warning("with dtype fp8 the weights of experts stay in bfloat16")
    if model.device.type == "cpu":
        _log.warning("dtype fp8 is for GPUs: the CPU computes it much more slowly than bfloat16")


def _fingerprint(source: Path, dtype: str) -> str:
    """Of the weights as they are used."""
    stored = fingerprint(source)
    if dtype != "fp8":
        return stored
    return hashlib.blake2b(f"{stored} fp8".encode(), digest_size=16).hexdigest()


def _require_fp8(option: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"{option} is fp8, which {torch.cuda.get_device_name(device)} does not compute with; "
            "expected a GPU of compute capability 8.9 (Ada, Hopper) or more: leave it out"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free_bytes: int = torch.cuda.mem_get_info(device)[0]
        return free_bytes
    return available_host_bytes()


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


def _context_notes(model: Any) -> tuple[str, ...]:
    """Say so where the context ends before the config does."""
    config = model.config.get_text_config()
    served, named = context_length(config), largest(config, "max_position_embeddings")
    if served is None or served >= named:
        return ()
    return (
        f"context: {served:,} of {named:,} tokens, as the rotary embeddings (longrope) of longer "
        "texts would change those of all that share a step",
    )


def _max_model_len(model: Any, tokenizer: Any | None, name: str) -> int:
    if (named := context_length(model.config.get_text_config())) is not None:
        return named
    length = getattr(tokenizer, "model_max_length", None)
    if isinstance(length, int) and length < 2**31:  # transformers writes 1e30 for "none"
        return length
    raise ModelError(
        f"the config of {name} names no context length; add max_position_embeddings to it"
    )
