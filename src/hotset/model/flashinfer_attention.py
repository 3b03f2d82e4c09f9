"""Paged attention by FlashInfer, on NVIDIA GPUs, straight from the block-major pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hotset.errors import ModelError
from hotset.memory.arena import DeviceArena
from hotset.model.attention import LayerAttention, SequenceSpan, slot_mapping

_WORKSPACE_BYTES = 256 * 2**20
_HEAD_DIMS = (64, 128, 256)


def why_unsupported(layers: Sequence[LayerAttention], dtype: torch.dtype) -> str | None:
    """What keeps FlashInfer from running these layers, or None where it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"KV of {dtype}"
    for layer in layers:
        if layer.has_sinks:
            return "attention sinks"
        if layer.query_dim != layer.value_dim or layer.query_dim not in _HEAD_DIMS:
            return f"head dimensions {layer.query_dim} and {layer.value_dim}"
    return None


@dataclass(frozen=True, slots=True)
class _Kind:
    """What FlashInfer plans for: layers that agree in this share a plan."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    softcap: float | None


class FlashInferBackend:
    """Attention of one step after another; implements `runner.AttentionBackend`.

    A step of decodes only uses the decode kernel on tensor cores (DESIGN decision 2: 4.39 TB/s
    against 2.95 without), any other step the prefill kernel for all its sequences.

    Raises:
        ModelError: FlashInfer is not installed or cannot be built.
    """

    def __init__(self, arena: DeviceArena, layers: Sequence[LayerAttention]) -> None:
        try:
            import flashinfer
        except (ImportError, OSError) as error:
            raise ModelError(
                f"attention on an NVIDIA GPU needs flashinfer-python ({error}); "
                "pip install 'hotset[cuda]'"
            ) from error
        self._flashinfer = flashinfer
        self._arena = arena
        device = arena.storage.device
        self._kinds = [
            _Kind(
                layer.num_heads,
                layer.kv.num_kv_heads,
                layer.query_dim,
                layer.scaling,
                layer.sliding_window,
                layer.softcap,
            )
            for layer in layers
        ]
        self._keys = [cache[:, 0] for cache in arena.layers]  # [num_blocks, block_size, H_kv, D]
        self._values = [cache[:, 1] for cache in arena.layers]
        self._decode: dict[_Kind, Any] = {}
        self._mixed: dict[_Kind, Any] = {}
        for kind in dict.fromkeys(self._kinds):
            # A workspace holds the plan until the step ends, so kinds cannot share one.
            self._decode[kind] = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                _workspace(device), "NHD", use_tensor_cores=True
            )
            self._mixed[kind] = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                _workspace(device), "NHD"
            )
        self._planned: dict[_Kind, Any] = {}
        self._slots: tuple[torch.Tensor, torch.Tensor]

    def begin_step(self, sequences: Sequence[SequenceSpan]) -> "FlashInferBackend":
        """Plan the step's attention; the result is good until the next call."""
        size, device = self._arena.block_size, self._arena.storage.device
        blocks, offsets = slot_mapping(sequences, size)
        slots = torch.tensor([blocks, offsets], pin_memory=True).to(device, non_blocking=True)
        self._slots = (slots[0], slots[1])
        query_starts, block_starts = [0], [0]
        tables: list[int] = []
        last_lens: list[int] = []
        for seq in sequences:
            num_blocks = -(-seq.context_len // size)
            tables += seq.block_table[:num_blocks]
            query_starts.append(query_starts[-1] + seq.num_tokens)
            block_starts.append(block_starts[-1] + num_blocks)
            last_lens.append((seq.context_len - 1) % size + 1)
        block_starts_cpu = torch.tensor(block_starts, dtype=torch.int32)
        last_lens_cpu = torch.tensor(last_lens, dtype=torch.int32)
        indices = torch.tensor(tables, dtype=torch.int32, pin_memory=True)
        indices = indices.to(device, non_blocking=True)
        is_decode = all(seq.num_tokens == 1 for seq in sequences)
        dtype = self._arena.storage.dtype
        for kind in self._decode:
            common = {
                "sm_scale": kind.scaling,
                "window_left": -1 if kind.window is None else kind.window - 1,
                "logits_soft_cap": kind.softcap,
                "q_data_type": dtype,
                "kv_data_type": dtype,
            }
            if is_decode:
                wrapper = self._decode[kind]
                wrapper.plan(
                    block_starts_cpu,
                    indices,
                    last_lens_cpu,
                    kind.num_heads,
                    kind.num_kv_heads,
                    kind.head_dim,
                    size,
                    **common,
                )
            else:
                wrapper = self._mixed[kind]
                wrapper.plan(
                    torch.tensor(query_starts, dtype=torch.int32),
                    block_starts_cpu,
                    indices,
                    last_lens_cpu,
                    kind.num_heads,
                    kind.num_kv_heads,
                    kind.head_dim,
                    size,
                    causal=True,
                    **common,
                )
            self._planned[kind] = wrapper
        return self

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend. See `attention.Attention`."""
        self._keys[layer][self._slots] = key.transpose(0, 1)
        self._values[layer][self._slots] = value.transpose(0, 1)
        output: torch.Tensor = self._planned[self._kinds[layer]].run(
            query.transpose(0, 1).contiguous(), (self._keys[layer], self._values[layer])
        )
        return output


def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
