"""Experts that host memory has no room for: written to disk layer by layer as a model is loaded."""

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hotset.cost.expert_sizes import with_disk
from hotset.expert_options import ExpertOptions, HostedExperts
from hotset.experts.host import Ahead, ExpertLayout, Ids, StoredExperts
from hotset.experts.sizes import sizes_of
from hotset.experts.slots import Slots
from hotset.experts.store import ExpertStore
from hotset.experts.weights import LayerExperts, Narrow, experts_layers, experts_of, is_experts

_NO_ASYNC_LOAD = "HF_DEACTIVATE_ASYNC_LOAD"  # of transformers


class DiskExperts:
    """The experts of one layer in a store, which knows it by its number."""

    def __init__(self, store: ExpertStore, layer: int) -> None:
        self.store, self.layout, self.rows = store, store.layout, store.rows
        self.payload_bytes, self.narrow = store.payload_bytes, store.narrow
        self.layer = layer

    def expect(self, experts: Ids, ahead: Ahead) -> None:
        """Start to read experts, in this order, as far as host memory has room."""
        keys: list[tuple[int, int]] = []
        for source, expert in ahead():
            assert isinstance(source, DiskExperts)
            keys.append((source.layer, expert))
        self.store.expect(self.layer, experts(), keys)

    def fetch(self, slots: Slots, experts: torch.Tensor, places: torch.Tensor) -> None:
        """Copy experts to slots, as they come to host memory; the host reads both lists."""

        def submitted() -> torch.cuda.Event | None:
            if slots.device.type != "cuda":
                return None
            event = torch.cuda.Event()
            event.record()
            return event

        for expert, slot in zip(experts.tolist(), places.tolist(), strict=True):
            if expert >= 0:
                with self.store.take(self.layer, expert, until=submitted) as payload:
                    slots.put(StoredExperts(self.layout, self.narrow, payload.unsqueeze(0)), slot)


class ExpertSink:
    """Takes the experts of a model to disk, one layer after another.

    `begin` decides whether that is needed. Then either `take` gets each layer, or they are caught
    on their way into the model (`catch_loaded`); `finish` ends it. Where it is not needed, or the
    model is of a kind that it cannot take, nothing happens and `store` is None.

    The file goes when `store` is closed, the model is forgotten, or the process ends.

    Args:
        asked: by the user; nothing happens where experts are all resident.
        read_deadline_s: the longest a step waits for one expert.

    Attributes:
        store: where the experts go.
    """

    def __init__(self, asked: ExpertOptions | HostedExperts, *, read_deadline_s: float) -> None:
        self._asked, self._read_deadline_s = asked, read_deadline_s
        self.store: ExpertStore | None = None
        self._num_taken = 0
        self._caught: dict[int, DiskExperts] = {}  # by module, until the model is loaded

    def begin(self, model: nn.Module) -> None:
        """Open the store for `model`, which need not have memory.

        Raises:
            ConfigError: host memory for too few experts, or a plan that cannot work.
            TierError: the folder cannot be used.
        """
        asked, layers = self._asked, experts_layers(model)
        kinds = {(each.num_experts, each.layout) for each in layers if each.is_plain}
        are_alike = len(kinds) == 1 and all(each.is_plain for each in layers)
        if not isinstance(asked, HostedExperts) or not are_alike:
            return
        slots = sizes_of(layers, asked, torch.device("cpu"))  # only for bytes of the host
        _, host_slots = with_disk(asked, slots)
        if host_slots is not None:
            layout, narrow = layers[0].layout, layers[0].narrow_in_file
            self.store = ExpertStore(
                asked.expert_disk_path or default_folder(),
                layout if narrow is None else ExpertLayout.of_narrow(narrow, layout.dtype),
                narrow=narrow,
                num_layers=slots.num_layers,
                num_experts=slots.num_experts,
                num_slots=host_slots,
                read_deadline_s=self._read_deadline_s,
            )

    def take(self, experts: LayerExperts) -> None:
        """Move the weights of one layer to the store. Raises TierError."""
        if isinstance(experts.state, Narrow):
            payloads = experts.state.payloads

            def fill(expert: int, payload: torch.Tensor) -> None:
                payload.copy_(payloads[expert])

            self.take_payloads(experts, fill)
            return
        assert experts.weights is not None
        experts.host(self._write(*experts.weights))

    def take_payloads(
        self, experts: LayerExperts, fill: Callable[[int, torch.Tensor], None]
    ) -> None:
        """As `take`, of narrow experts that come from a checkpoint; see `write_payloads`."""
        assert self.store is not None
        self.store.write_payloads(self._num_taken, fill)
        experts.host(self._taken())

    @property
    def keeps_narrow(self) -> bool:
        """Whether experts that a checkpoint has in few bits are to be kept as they are there."""
        return isinstance(self._asked, HostedExperts) and self._asked.expert_cold_dtype == "auto"

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
        # By module, until it is complete: a checkpoint has its weights one after another.
        parts: dict[int, dict[str, torch.Tensor]] = {}

        def catch(module: nn.Module, name: str, weight: nn.Parameter) -> nn.Parameter | None:
            if (
                threading.get_ident() != thread
                or weight.device.type == "meta"
                or not is_experts(module)
                or name not in experts_of(module).names
            ):
                return None
            found = parts.setdefault(id(module), {})
            found[name] = weight.data
            if len(found) == 2:
                up, down = (found[name] for name in experts_of(module).names)
                self._caught[id(module)] = self._write(up, down)
                del parts[id(module)], up, down, found
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
        for experts in experts_layers(model):
            if experts.hosted is None:
                experts.host(self._caught.pop(id(experts.module)))
        weakref.finalize(model, self.store.close)

    def close(self) -> None:
        """Give up, where the model could not be loaded."""
        if self.store is not None:
            self.store.close()

    def _write(self, up: torch.Tensor, down: torch.Tensor) -> DiskExperts:
        assert self.store is not None
        self.store.write_layer(self._num_taken, up, down)
        return self._taken()

    def _taken(self) -> DiskExperts:
        """The layer that the store has got."""
        assert self.store is not None
        self._num_taken += 1
        _trim_heap()
        return DiskExperts(self.store, self._num_taken - 1)


def default_folder() -> Path:
    """Where experts are, if not said."""
    return Path(platformdirs.user_cache_dir("hotset")) / "experts"


def _trim_heap() -> None:
    """Give freed memory back to the operating system, where the C library can.

    Tensors of a few MB come from glibc's heap. It kept those of all layers in 2 of 10 loads: as
    much as the experts that were not to be in memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
