"""Attention that computes nothing and notes what each layer asks for."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from hotset.attention.mixers import MixerStep
from hotset.attention.scans import Convolution, Scan
from hotset.attention.sparse.indexer import Index
from hotset.attention.spec import LayerAttention
from hotset.cost.cache_spec import State
from hotset.errors import ModelError

# Layers whose keys a probe keeps. Some of them see positions; later ones may follow other experts.
_FIRST_LAYERS = 4


class ProbeAttention(MixerStep):
    """Notes what each layer asks for; its result is zeros.

    One forward pass with it tells what has to be cached, for any architecture.

    Attributes:
        layers: what each asked for, by its index.
        states: what each keeps beside keys and values, by its index.
        rows_are_alike: whether the first and the last row were always the same; the pass is to give
            them the same token at the same position.
        first_keys: `[H_kv, T, D]` of the first few layers; of those with latents the rotary keys.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerAttention] = {}
        self.states: dict[int, State] = {}
        self.rows_are_alike = True
        self.first_keys: list[torch.Tensor] = []

    def note(self, layer: int, asked: LayerAttention) -> None:
        """Say what `layer` asks for, before it attends.

        Raises:
            ModelError: it has asked before.
        """
        if layer in self.layers:
            raise ModelError(f"layer {layer} calls its attention twice a step: not supported")
        self.layers[layer] = asked

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: Index | None = None,
    ) -> torch.Tensor:
        """Compare the rows and return zeros. See `StepAttention`."""
        rows = [tensor.transpose(0, 1) for tensor in (query, key, value)]
        if index is not None:
            rows += [tensor[0] for tensor in (index.query, index.key, index.weights)]
        self._compare(rows)
        if len(self.first_keys) < _FIRST_LAYERS:
            self.first_keys.append(key.clone())
        return query.new_zeros(query.shape[1], query.shape[0], self.layers[layer].heads.value_dim)

    def convolve(self, layer: int, convolution: Convolution) -> torch.Tensor:
        """Note the columns, compare the rows and return zeros. See `MixerStep`."""
        if layer in self.states:
            raise ModelError(f"layer {layer} convolves twice a step: not supported")
        values, (channels, kernel) = convolution.values, convolution.weight.shape
        self._compare([values.T])
        self.states[layer] = State((), (channels, kernel - 1), values.dtype.itemsize)
        return torch.zeros_like(values)

    def scan(self, layer: int, scan: Scan) -> torch.Tensor:
        """Note the state, compare the rows and return zeros. See `MixerStep`."""
        state = self.states.get(layer)
        if state is None or state.recurrent:
            raise ModelError(f"layer {layer} scans twice a step, or before it convolves")
        self._compare(scan.rows)
        self.states[layer] = replace(state, recurrent=scan.state_shape)
        return scan.new_output().zero_()

    def _compare(self, rows: Iterable[torch.Tensor]) -> None:
        self.rows_are_alike = self.rows_are_alike and all(map(ends_are_alike, rows))


def ends_are_alike(rows: torch.Tensor) -> bool:
    """Whether the first and the last of `[T, ...]` rows are alike."""
    return are_alike(rows[0], rows[-1])


def are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of a shape agree but for rounding; True on `meta`."""
    if one.is_meta:
        return True
    bound = torch.finfo(one.dtype).eps ** 0.5 * one.float().abs().max()
    return bool((one.float() - other.float()).abs().max() <= bound)
