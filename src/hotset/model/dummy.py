"""A model of a known shape with random weights, for benchmarks."""

import hashlib
import json
from pathlib import Path
from typing import Any

import accelerate
import torch
from transformers import AutoConfig, PreTrainedModel

from hotset.cost.catalog import find_config
from hotset.errors import ModelError, PlanError
from hotset.experts.disk import ExpertSink
from hotset.experts.gating import move_but_experts
from hotset.experts.router_skew import skew_routers
from hotset.experts.weights import experts_bytes, experts_of, is_experts
from hotset.libraries import first_line, quiet
from hotset.model.architecture import Architecture, find_architecture, known_fields
from hotset.model.devices import check_room, resolve_device, resolve_dtype
from hotset.model.finish import closing_on_error, finish, max_model_len
from hotset.model.loaded import LoadedModel


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
    follow transformers' rules for training, and equal seeds give equal weights.

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
    torch_dtype = resolve_dtype(dtype, target)
    architecture, short_name = _architecture_of(name)
    torch_dtype = torch_dtype or architecture.dtype or torch.bfloat16
    shape = architecture.outline(torch_dtype)
    devices = [target] if target.type == "cuda" else []
    with closing_on_error(experts):
        _check_room(shape, target, short_name, experts_on_host=experts_on_host, experts=experts)
        with quiet(), torch.random.fork_rng(devices), torch.device(target):
            torch.manual_seed(seed)
            model = _make(
                architecture, torch_dtype, target, experts_on_host=experts_on_host, experts=experts
            )
    if router_skew is not None:
        skew_routers(model, router_skew, seed=seed)
    notes = finish(model, dtype, architecture)
    made_of = [architecture.fields, dtype, str(model.dtype), seed, router_skew]
    content = json.dumps(made_of, sort_keys=True, default=str).encode()
    return LoadedModel(
        model=model,
        tokenizer=None,
        name=short_name,
        fingerprint=hashlib.blake2b(content, digest_size=16).hexdigest(),
        eos_token_ids=(),
        max_model_len=max_model_len(model, None, short_name),
        notes=notes,
    )


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


def _check_room(
    shape: PreTrainedModel,
    target: torch.device,
    name: str,
    *,
    experts_on_host: bool,
    experts: ExpertSink | None,
) -> None:
    """Refuse weights that fit neither on the device nor, of experts, into host memory."""
    weights_bytes = sum(parameter.nbytes for parameter in shape.parameters())
    host_bytes = experts_bytes(shape) if experts_on_host else 0
    if experts_on_host and experts is not None:
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
    device: torch.device,
    *,
    experts_on_host: bool,
    experts: ExpertSink | None,
) -> Any:
    """What `from_config` makes; with experts on the host, one layer's at a time on the device."""
    with accelerate.init_empty_weights(include_buffers=False):
        model: Any = architecture.make(dtype)
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
        if to_disk is not None and is_experts(module):
            to_disk.take(experts_of(module))
        elif experts_on_host and is_experts(module):
            module._apply(lambda tensor: tensor.to("cpu"), recurse=False)

    with torch.no_grad():
        make(model, model)
    if to_disk is not None:
        to_disk.finish(model)
    if experts_on_host:
        move_but_experts(model, device)  # biases and the like
    model.tie_weights()
    return model
