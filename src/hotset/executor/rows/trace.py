"""Run a model for one token and note what it computes."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from hotset.attention.mixers import step_keywords
from hotset.attention.sparse.indexer import Index
from hotset.executor.rows.lowering import LOWERED
from hotset.executor.rows.nodes import (
    Attend,
    Buffer,
    Compute,
    Embed,
    Node,
    Product,
    Trace,
    View,
)
from hotset.linear.narrow import NarrowEmbedding, NarrowLinear
from hotset.linear.tile_product import multiply

_TOKEN, _POSITION = 1, 1


class NotTraceable(Exception):
    """The model computes what has no place in a trace; says what."""


def trace(model: PreTrainedModel) -> Trace:
    """What `model`, switched to paged attention by `inspect_model`, computes for one token.

    What is computed from weights alone is computed now. Rows of several tokens are taken to be
    independent of each other but for attention, which `inspect_model` has made sure of.

    Raises:
        NotTraceable: it computes something else than products with narrow weights, attention, and
            operations of `lowering` in float32.
    """
    recorder = _Recorder()
    ids, positions = torch.tensor([[_TOKEN]]), torch.tensor([[_POSITION]])
    recorder.token_ids, recorder.positions = ids, positions
    keywords = dict.fromkeys(step_keywords(model), recorder)
    with torch.inference_mode(), recorder.in_place_of_modules(model), recorder:
        output = model(input_ids=ids, position_ids=positions, use_cache=False, **keywords)
    return recorder.end(output.logits)


class _Recorder(TorchDispatchMode):
    """Notes the operations of one token. A `StepAttention` too, which attends to nothing.

    A tensor is known by its storage: views of what is known need no noting. All tensors stay until
    the end, so that no storage is taken twice.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: list[Buffer] = []
        self._nodes: list[Node] = []
        self._kept: list[torch.Tensor] = []
        self._by_storage: dict[int, int] = {}
        self._position_buffer: int | None = None
        self._is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and note it where it computes from the token."""
        kwargs = kwargs or {}
        given = list(_tensors([args, kwargs]))
        if self._is_paused or not any(map(self._is_of_token, given)):
            return func(*args, **kwargs)
        with self:  # in inference mode operations come whole, not as those they consist of
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        results = list(_tensors(out))
        self._kept += [*given, *results]
        if not func._schema.is_mutable and all(map(self._is_of_token, results)) and results:
            return out  # a view
        name = func._overloadpacket._qualified_op_name.removeprefix("aten::")
        lower = LOWERED.get(name.removesuffix("_"))
        if lower is None or len(results) != 1:
            raise NotTraceable(f"it computes {name}")
        if func._schema.is_mutable and not self._is_of_token(results[0]):
            raise NotTraceable(f"it writes to its own memory ({name})")
        lower(self, results[0], args, kwargs)
        return out

    def compute(
        self, operation: str, out: torch.Tensor, *inputs: torch.Tensor | float, over: Any = None
    ) -> None:
        """Note an operation. `over`: the sizes that are gone through, where not those of `out`."""
        sizes = tuple(out.shape) if over is None else tuple(over)
        views = tuple(
            self.view(each).over(sizes) if isinstance(each, torch.Tensor) else float(each)
            for each in inputs
        )
        self._nodes.append(Compute(operation, self._written(out), views))

    def refuse(self, what: str) -> None:
        """Raise `NotTraceable`."""
        raise NotTraceable(f"it computes {what}")

    def view(self, tensor: torch.Tensor) -> View:
        """Of a tensor that is read; of the model's own it becomes a constant."""
        key = _storage_of(tensor)
        if tensor.data_ptr() == self.positions.data_ptr():
            if self._position_buffer is None:
                self._position_buffer = self._add(tensor, Buffer(2))  # 8 bytes
        elif key not in self._by_storage:
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise NotTraceable(f"it computes with {tensor.dtype} on {tensor.device.type}")
            self._add(tensor, Buffer(0, tensor))
        offset = int(tensor.storage_offset())
        return View(self._by_storage[key], offset, tuple(tensor.shape), tensor.stride())

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: Index | None = None,
    ) -> torch.Tensor:
        """Note the layer; the result is zeros. See `StepAttention`."""
        if index is not None:
            raise NotTraceable("it selects what it attends to")
        with self._paused():
            out = query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])
        buffer = self._written(out).buffer
        views = self.view(query), self.view(key), self.view(value)
        self._nodes.append(Attend(layer, *views, buffer))
        return out

    @contextlib.contextmanager
    def in_place_of_modules(self, model: nn.Module) -> Iterator[None]:
        """While it lasts, narrow linear layers and embeddings of `model` are noted as such."""
        replaced: list[nn.Module] = []
        for module in model.modules():
            if isinstance(module, NarrowLinear):
                module.forward = partial(self._linear, module)  # type: ignore[method-assign]
            elif isinstance(module, NarrowEmbedding | nn.Embedding):
                module.forward = partial(self._embedding, module)  # type: ignore[method-assign]
            else:
                continue
            replaced.append(module)
        try:
            yield
        finally:
            for module in replaced:
                del module.forward

    def end(self, logits: torch.Tensor) -> Trace:
        """All that was noted."""
        if logits.dtype != torch.float32 or logits.stride(-1) != 1:
            raise NotTraceable(f"its logits are of {logits.dtype}, or not side by side")
        return Trace(self._buffers, self._nodes, self._position_buffer, self.view(logits))

    def _linear(self, layer: NarrowLinear, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(1, -1)
        if self.view(flat).offset or flat.numel() != self._buffers[self.view(flat).buffer].width:
            flat = flat.clone()
        with self._paused():
            out = multiply(flat.contiguous(), layer.tiles)
        whole = self._written(out).buffer
        self._nodes.append(Product(layer.tiles, self.view(flat).buffer, whole))
        if layer.bias is not None:
            out = out + layer.bias
        return out.view(*x.shape[:-1], layer.out_features)

    def _embedding(self, module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        of_positions = ids.data_ptr() == self.positions.data_ptr()
        if not of_positions and ids.data_ptr() != self.token_ids.data_ptr():
            raise NotTraceable("it embeds something else than tokens and positions")
        with self._paused():
            out: torch.Tensor = type(module).forward(module, ids).contiguous()
        self._nodes.append(Embed(module, of_positions, self._written(out).buffer))
        return out

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _is_of_token(self, tensor: torch.Tensor) -> bool:
        buffer = self._by_storage.get(_storage_of(tensor))
        if buffer is None:
            return tensor.data_ptr() in (self.token_ids.data_ptr(), self.positions.data_ptr())
        return self._buffers[buffer].constant is None

    def _written(self, out: torch.Tensor) -> View:
        if out.dtype != torch.float32:
            raise NotTraceable(f"it computes {out.dtype}")
        if _storage_of(out) not in self._by_storage:
            self._add(out, Buffer(out.untyped_storage().nbytes() // 4))
        return self.view(out)

    def _add(self, tensor: torch.Tensor, buffer: Buffer) -> int:
        self._buffers.append(buffer)
        self._kept.append(tensor)
        self._by_storage[_storage_of(tensor)] = number = len(self._buffers) - 1
        return number


def _storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for each in given:
            yield from _tensors(each)
    elif isinstance(given, dict):
        yield from _tensors(list(given.values()))
