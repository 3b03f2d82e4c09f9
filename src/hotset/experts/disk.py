"""Experts that host memory has no room for: written to disk layer by layer as a model is loaded."""

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hotset.config import GIB, EngineConfig
from hotset.errors import ConfigError
from hotset.experts.gating import Experts, experts_layers, is_experts, is_plain, up_name
from hotset.experts.host import ExpertLayout
from hotset.experts.narrow import NarrowLayout
from hotset.experts.store import FEWEST_SLOTS, DiskExperts, ExpertStore

_NO_ASYNC_LOAD = "HF_DEACTIVATE_ASYNC_LOAD"  # of transformers


class ExpertSink:
    """Takes the experts of a model to disk, one layer after another.

    `begin` decides whether that is needed. Then either `take` gets each layer, or they are caught
    on their way into the model (`catch_loaded`); `finish` ends it. Where it is not needed, or the
    model is of a kind that it cannot take, nothing happens and `store` is None.

    The file goes when `store` is closed, the model is forgotten, or the process ends.

    Args:
        config: asks for it by `expert_host_gib`.

    Attributes:
        store: where the experts go.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.store: ExpertStore | None = None
        self._num_taken = 0

    def begin(self, model: nn.Module) -> None:
        """Open the store for `model`, which need not have memory.

        Raises:
            ConfigError: host memory for too few experts, or a plan that cannot work.
            TierError: the folder cannot be used.
        """
        layers = experts_layers(model)
        if self._config.expert_host_gib is None or not all(is_plain(layer) for layer in layers):
            return
        kinds = {(layer.num_experts, layout_of(layer)) for layer in layers}
        if len(kinds) == 1:
            num_experts, layout = kinds.pop()
            self.store = _open_store(self._config, layout, len(layers), num_experts)

    def take(self, layer: Experts) -> None:
        """Move the weights of one layer to the store. Raises TierError."""
        self._write(layer, getattr(layer, up_name(layer)), layer.down_proj)
        _drop_weights(layer)

    @contextmanager
    def catch_loaded(self) -> Iterator[None]:
        """Take what transformers' `from_pretrained` loads in this block, in this thread.

        Each weight of experts goes to the store in place of the model, and only those of the layer
        under way are in memory.
        """
        if self.store is None:
            yield
            return
        thread = threading.get_ident()
        # By layer, until it is complete: a checkpoint has its weights one after another.
        parts: dict[int, dict[str, torch.Tensor]] = {}

        def catch(module: nn.Module, name: str, weight: nn.Parameter) -> nn.Parameter | None:
            if (
                threading.get_ident() != thread
                or weight.device.type == "meta"
                or not is_experts(module)
                or name not in (up_name(module), "down_proj")
            ):
                return None
            found = parts.setdefault(id(module), {})
            found[name] = weight.data
            if len(found) == 2:
                self._write(module, found[up_name(module)], found["down_proj"])
                del parts[id(module)]
            empty = nn.Parameter(weight.data.to("meta"), requires_grad=False)
            empty._is_hf_initialized = True  # type: ignore[attr-defined]
            return empty

        # Its type says that the hook returns nothing; it may return another parameter.
        hook = register_module_parameter_registration_hook(catch)  # type: ignore[arg-type]
        before = os.environ.get(_NO_ASYNC_LOAD)
        os.environ[_NO_ASYNC_LOAD] = "1"  # its threads would read ahead without a bound
        try:
            yield
        finally:
            hook.remove()
            if before is None:
                del os.environ[_NO_ASYNC_LOAD]
            else:
                os.environ[_NO_ASYNC_LOAD] = before

    def finish(self, model: nn.Module) -> None:
        """All layers of `model` were taken, or caught."""
        if self.store is None:
            return
        assert self._num_taken == self.store.num_layers
        for layer in experts_layers(model):
            _drop_weights(layer)
        weakref.finalize(model, self.store.close)

    def close(self) -> None:
        """Give up, where the model could not be loaded."""
        if self.store is not None:
            self.store.close()

    def _write(self, layer: Experts, up: torch.Tensor, down: torch.Tensor) -> None:
        assert self.store is not None
        self.store.write_layer(self._num_taken, up, down)
        layer.expert_host = DiskExperts(self.store, self._num_taken)
        self._num_taken += 1
        _trim_heap()


def layout_of(layer: Experts) -> ExpertLayout:
    """The layout of the experts of a layer, wherever they are."""
    if hasattr(layer, "expert_host"):
        layout: ExpertLayout = layer.expert_host.layout
        return layout
    up, down = getattr(layer, up_name(layer)), layer.down_proj
    return ExpertLayout(tuple(up.shape[1:]), tuple(down.shape[1:]), up.dtype)


def default_folder() -> Path:
    """Where experts are, if not said."""
    return Path(platformdirs.user_cache_dir("hotset")) / "experts"


def _open_store(
    config: EngineConfig, layout: ExpertLayout, num_layers: int, num_experts: int
) -> ExpertStore | None:
    """None where host memory holds all."""
    assert config.expert_host_gib is not None
    payload_bytes = layout.payload_bytes
    if config.expert_cold_dtype != "auto":
        narrow = NarrowLayout(layout.up, layout.down, config.expert_cold_dtype)
        payload_bytes = narrow.payload_bytes
    num_slots = int(config.expert_host_gib * GIB) // payload_bytes
    if num_slots >= num_layers * num_experts:
        return None
    given = f"expert_host_gib is {config.expert_host_gib}"
    if config.expert_cold_dtype != "auto":
        all_gib = num_layers * num_experts * payload_bytes / GIB
        raise ConfigError(
            f"{given} and expert_cold_dtype is {config.expert_cold_dtype}, in which the experts "
            f"take {all_gib:.3f} GiB; what is on disk is not rounded: leave expert_cold_dtype out, "
            "or give more memory"
        )
    if num_slots < FEWEST_SLOTS:
        least = FEWEST_SLOTS * layout.payload_bytes
        raise ConfigError(
            f"{given}, which holds {num_slots} experts of this model; at least {FEWEST_SLOTS} are "
            f"needed to read others from disk: give {-(-least * 1_000_000 // GIB) / 1_000_000} or "
            "more"
        )
    if config.expert_plan == "stream":
        all_gib = num_layers * num_experts * layout.payload_bytes / GIB
        raise ConfigError(
            f"expert_plan is 'stream', which copies whole layers from host memory, but {given} and "
            f"the experts take {all_gib:.3f} GiB; leave expert_plan out, or give more memory"
        )
    return ExpertStore(
        config.expert_disk_path or default_folder(),
        layout,
        num_layers=num_layers,
        num_experts=num_experts,
        num_slots=num_slots,
        read_deadline_s=config.disk_read_deadline_s,
    )


def _trim_heap() -> None:
    """Give freed memory back to the operating system, where the C library can.

    Tensors of a few MB come from glibc's heap. It kept those of all layers in 2 of 10 loads: as
    much as the experts that were not to be in memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _drop_weights(layer: Experts) -> None:
    for name in (up_name(layer), "down_proj"):
        setattr(layer, name, None)
