"""Attention of steps that only decode, as calls of compiled code."""

import ctypes
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from hotset.attention.batch import Batch
from hotset.attention.inputs import Inputs
from hotset.attention.paged_decodes import (
    PagedDecodes,
    PagedShape,
    can_attend,
    compiled,
    layer_arguments,
)
from hotset.attention.spec import LayerAttention
from hotset.executor.rows import shapes
from hotset.executor.rows.calls import FEWEST_IN_THREADS, Calls
from hotset.executor.rows.nodes import Compute, View
from hotset.executor.rows.shapes import RowShape
from hotset.memory.arena import DeviceArena

_OF_STEP = slice(2, 7)  # what a step says of its sequences, in `paged_decodes.ARGUMENTS`


class Decodes:
    """Where the sequences of a step and their KV are, for calls that store and attend.

    Args:
        arena: has the KV, of all layers alike.
        layers: what each asks for.
        room: most sequences of a step.
    """

    def __init__(self, arena: DeviceArena, layers: Sequence[LayerAttention], room: int) -> None:
        self._arena, self._layers = arena, layers
        self._places = torch.zeros(room, dtype=torch.int64)  # of rows in the cache, in bytes
        self._strides = [4 * stride for stride in arena.layers[0].unbind(1)[0].stride()]
        self._windows: dict[int | None, list[npt.NDArray[np.int64]]] = defaultdict(list)
        self._scaling: list[ctypes.c_float] = []
        self._of_step: list[PagedDecodes] = []  # whose memory the calls read

    @staticmethod
    def can_attend(arena: DeviceArena, layers: Sequence[LayerAttention]) -> bool:
        """Whether there is code for what layers ask for, and it attends rightly."""
        strides = {cache.stride() for cache in arena.layers}
        return len(strides) == 1 and all(
            asked.is_plain
            and scales == (1, 1)
            and cache.dtype == torch.float32
            and can_attend(_shape(asked, arena.block_size))
            for asked, cache, scales in zip(layers, arena.layers, arena.scales, strict=True)
        )

    def add(
        self,
        calls: Calls,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Append the calls of a layer.

        Args:
            calls: appended to.
            layer: its index.
            query: `[H, T, D]` in memory of steps, as `key` and `value`.
            key: `[H_kv, T, D]`.
            value: `[H_kv, T, D_v]`.
            out: `[T, H, D_v]`, likewise.
        """
        asked = self._layers[layer]
        keys, values = self._arena.layers[layer].unbind(1)
        addresses = [each.data_ptr() for each in (key, value, keys, values)]
        store = shapes.compiled(self._store_shape(key, value))
        calls.add(store, [0, 0, *addresses, self._places.data_ptr()], FEWEST_IN_THREADS)
        scaling = ctypes.c_float(asked.scaling)
        self._scaling.append(scaling)
        given = layer_arguments(query, keys, values, out, scaling)
        arguments = np.array([0] * _OF_STEP.stop + given, dtype=np.int64)
        self._windows[asked.heads.window].append(arguments)
        calls.add(compiled(_shape(asked, self._arena.block_size)), arguments, 1)

    def prepare(self, batch: Batch, inputs: Inputs) -> None:
        """Say where the sequences of a step are, each of one token."""
        block_bytes, token_bytes = self._strides[:2]
        places = self._places[: batch.num_tokens]
        torch.add(inputs.blocks * block_bytes, inputs.offsets, alpha=token_bytes, out=places)
        self._of_step.clear()
        for window, layers in self._windows.items():
            decodes = PagedDecodes(batch.sequences, window, self._arena.block_size)
            self._of_step.append(decodes)
            given = np.array(decodes.arguments()[_OF_STEP], dtype=np.int64)
            for arguments in layers:
                arguments[_OF_STEP] = given

    def _store_shape(self, key: torch.Tensor, value: torch.Tensor) -> RowShape:
        """Copies of a row's key and value to its place."""
        head = self._strides[2] // 4
        computes = []
        for number, new in enumerate((key, value)):
            sizes, strides = tuple(new.shape[::2]), new.stride()[::2]
            source, target = View(number, 0, sizes, strides), View(2 + number, 0, sizes, (head, 1))
            computes.append(Compute("copy", target, (source,)))
        row_bytes = (4 * key.stride(1), 4 * value.stride(1), None, None)
        return RowShape(tuple(computes), row_bytes, ())


def _shape(asked: LayerAttention, block_size: int) -> PagedShape:
    heads = asked.heads
    return PagedShape(
        asked.num_heads // heads.num_kv_heads, heads.key_dim, heads.value_dim, block_size
    )
