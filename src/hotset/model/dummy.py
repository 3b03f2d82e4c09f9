"""A model of a known shape with random weights, for benchmarks."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from transformers import AutoConfig, PreTrainedModel

from hotset.cost.catalog import find_config
from hotset.cost.quantisation import quant_config, stored_format
from hotset.errors import ModelError, PlanError
from hotset.experts.disk import ExpertSink
from hotset.experts.gating import move_but_experts
from hotset.experts.host import ExpertLayout
from hotset.experts.hosting import move_to_host
from hotset.experts.narrow import NarrowLayout
from hotset.experts.random_payloads import random_payloads
from hotset.experts.router_skew import skew_routers
from hotset.experts.sizes import slots_hold, why_not_hosted
from hotset.experts.slices import ExpertSlice
from hotset.experts.weights import (
    LayerExperts,
    Narrow,
    experts_bytes,
    experts_layers,
    experts_of,
    is_experts,
)
from hotset.libraries import first_line, quiet
from hotset.model.architecture import Architecture, find_architecture, known_fields
from hotset.model.cut_model import ModelCutter
from hotset.model.devices import check_room, resolve_device, resolve_dtype
from hotset.model.finish import closing_on_error, finish, max_model_len
from hotset.model.loaded import LoadedModel
from hotset.model.narrow_experts import narrow_layout_of

_STD = 0.02  # of random weights in few bits, as transformers initialises others


@dataclass(frozen=True, slots=True)
class _Places:
    """Where weights go; see `load_dummy`."""

    target: torch.device
    experts_on_host: bool
    experts: ExpertSink | None


@dataclass(frozen=True, slots=True)
class _Narrow:
    """How experts are in few bits.

    Attributes:
        drawn: whole ones.
        slice: the part of each that this rank has; None is all.
        kept: what it keeps.
    """

    drawn: NarrowLayout
    slice: ExpertSlice | None
    kept: NarrowLayout


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

    Each weight is made on the device in its dtype, so none is in memory twice. Initial values
    follow transformers' rules for training, and equal seeds give equal weights. Experts that the
    config has in few bits are random bits in that format, where `load_model` would keep them so;
    what else it has in few bits is made in the dtype.

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
            it, or its weights are larger than the memory that is free.
        ConfigError: there is no such device or dtype, or nothing to be skewed.
        TierError: as for `load_model`.
    """
    target = resolve_device(device)
    asked_dtype = resolve_dtype(dtype, target)
    architecture, short_name = _architecture_of(name)
    torch_dtype = asked_dtype or architecture.dtype or torch.bfloat16
    shape = architecture.outline(torch_dtype)
    places = _Places(target, experts_on_host, experts)
    cutter = ModelCutter(shape, short_name)
    narrow = _narrow_of(architecture, shape, places, cutter)
    cutter.cut_all(shape)
    with closing_on_error(experts):
        _check_room(shape, short_name, narrow, places)
        with quiet(), _drawing(target, seed):
            model = _make(architecture, torch_dtype, narrow, cutter, places)
    if router_skew is not None:
        skew_routers(model, router_skew, seed=seed)
    notes = finish(model, dtype, architecture)
    cutter.join_outputs(model)
    return LoadedModel(
        model=model,
        tokenizer=None,
        name=short_name,
        fingerprint=_fingerprint(architecture.fields, dtype, str(model.dtype), seed, router_skew),
        eos_token_ids=(),
        max_model_len=max_model_len(model, None, short_name),
        notes=notes,
    )


@contextlib.contextmanager
def _drawing(device: torch.device, seed: int) -> Iterator[None]:
    """Tensors are made on the device, and random ones follow from `seed`, in the block alone."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), device:
        torch.manual_seed(seed)
        yield


def _fingerprint(*made_of: object) -> str:
    content = json.dumps(made_of, sort_keys=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _architecture_of(name: str) -> tuple[Architecture, str]:
    """How to make the model of a config, and a short name for it."""
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
    return find_architecture(config, source, fields), short_name


def _narrow_of(
    architecture: Architecture, shape: PreTrainedModel, places: _Places, cutter: ModelCutter
) -> _Narrow | None:
    """How experts are in few bits, as `load_model` would keep them; `shape` is told so."""
    form = stored_format(quant_config(architecture.fields) or {})
    experts = places.experts
    keeps = not places.experts_on_host or experts is None or experts.keeps_narrow
    if form is None or not keeps or why_not_hosted(shape):
        return None
    layers = experts_layers(shape)
    drawn, part = narrow_layout_of(layers[0], form), cutter.slice_of(layers[0])
    narrow = drawn if drawn is None or part is None else part.narrow(drawn)
    # A CPU widens what it has in slots.
    on_cpu = places.experts_on_host and places.target.type == "cpu"
    if drawn is None or narrow is None:
        return None
    if not on_cpu and not slots_hold(layers[0], narrow, places.target):
        return None
    for each in layers:
        each.narrow_in_file = narrow
    return _Narrow(drawn, part, narrow)


def _check_room(shape: PreTrainedModel, name: str, narrow: _Narrow | None, places: _Places) -> None:
    """Refuse weights that fit neither on the device nor, of experts, into host memory."""
    target, experts = places.target, places.experts
    weights_bytes = sum(parameter.nbytes for parameter in shape.parameters())
    all_bytes = experts_bytes(shape)
    if narrow is not None:
        weights_bytes -= all_bytes
        all_bytes = narrow.kept.payload_bytes * sum(
            each.num_experts for each in experts_layers(shape)
        )
        weights_bytes += all_bytes
    host_bytes = all_bytes if places.experts_on_host else 0
    if places.experts_on_host and experts is not None:
        experts.begin(shape)
        if experts.store is not None:
            weights_bytes -= host_bytes - experts.store.host_bytes
            host_bytes = experts.store.host_bytes
    # On the CPU the two are the same memory.
    here_bytes = weights_bytes if target.type == "cpu" else weights_bytes - host_bytes
    check_room(here_bytes, target, name, shape.dtype)
    check_room(host_bytes, torch.device("cpu"), name, shape.dtype)


def _make(
    architecture: Architecture,
    dtype: torch.dtype,
    narrow: _Narrow | None,
    cutter: ModelCutter,
    places: _Places,
) -> Any:
    """What `from_config` makes; with experts on the host, one layer's at a time on the device.

    Weights are drawn whole, so that any number of ranks has parts of the same ones.
    """
    device, experts_on_host, experts = places.target, places.experts_on_host, places.experts
    with accelerate.init_empty_weights(include_buffers=False):
        model: Any = architecture.make(dtype)
    to_disk = experts if experts is not None and experts.store is not None else None

    def make(path: str, module: torch.nn.Module, owner: PreTrainedModel) -> None:
        # In the order of transformers' `initialize_weights`.
        for name, child in module.named_children():
            child_owner = child if isinstance(child, PreTrainedModel) else owner
            make(f"{path}.{name}" if path else name, child, child_owner)
        if narrow is not None and is_experts(module):
            layer = experts_of(module)
            _make_narrow(layer, narrow, device)
            cutter.cut(path, module)
            if to_disk is not None:
                to_disk.take(layer)
            elif experts_on_host:
                move_to_host(layer, narrow.kept, device)
            return
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty_like(weight, device=device)
                module._parameters[name] = torch.nn.Parameter(empty)
        module._is_hf_initialized = False  # type: ignore[assignment]
        owner._initialize_weights(module)
        cutter.cut(path, module)
        if to_disk is not None and is_experts(module):
            to_disk.take(experts_of(module))
        elif experts_on_host and is_experts(module):
            module._apply(lambda tensor: tensor.to("cpu"), recurse=False)

    with torch.no_grad():
        make("", model, model)
    if to_disk is not None:
        to_disk.finish(model)
    if experts_on_host:
        move_but_experts(model, device)  # biases and the like
    model.tie_weights()
    return model


def _make_narrow(experts: LayerExperts, narrow: _Narrow, device: torch.device) -> None:
    """Random experts of a layer on the device, in few bits; biases are zeros."""
    layout = ExpertLayout.of_narrow(narrow.kept, experts.layout.dtype)
    payloads = random_payloads(narrow.drawn, experts.num_experts, std=_STD, device=device)
    if narrow.slice is not None:
        payloads = narrow.slice.payloads(narrow.drawn, narrow.kept, payloads)
    experts.hold(Narrow(layout, narrow.kept, payloads))
    parameters = experts.module._parameters
    for name, bias in parameters.items():
        if bias is not None:
            parameters[name] = torch.nn.Parameter(torch.zeros_like(bias, device=device))
