"""Device memory for the state of sequences: one contiguous run of bytes for each slot."""

from collections.abc import Mapping

import torch

from hotset.cost.cache_spec import STATE_BYTES, State, state_slot_bytes


class StateArena:
    """Slots for the state of sequences: a slot is one contiguous run over all layers.

    A slot has the recurrent state of each layer, then the columns of each layer's convolution.
    A step reads one slot of a sequence and writes to one, which may be the same.

    Args:
        specs: what each layer keeps, by its index in the model.
        num_slots: with those that no sequence gets.
        dtype: of the convolutions' columns.
        device: where they are.

    Attributes:
        recurrent: of each layer that has some, float32 `[num_slots, heads, values, keys]`, strided
            by the slot.
        columns: of each layer, `[num_slots, channels, kernel - 1]`, strided by the slot.
        slot_bytes: of one slot.
        memory: uint8 `[num_slots, slot_bytes]`, by which slots are copied.
    """

    def __init__(
        self,
        specs: Mapping[int, State],
        *,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slot_bytes = state_slot_bytes(specs.values())
        self.memory = torch.zeros(num_slots, self.slot_bytes, dtype=torch.uint8, device=device)
        self.recurrent: dict[int, torch.Tensor] = {}
        self.columns: dict[int, torch.Tensor] = {}
        start = 0
        for layer, spec in specs.items():
            if spec.recurrent:
                end = start + spec.num_values * STATE_BYTES
                values = self.memory[:, start:end].view(torch.float32)
                self.recurrent[layer] = values.view(num_slots, *spec.recurrent)
                start = end
        for layer, spec in specs.items():
            end = start + spec.conv_bytes
            columns = self.memory[:, start:end].view(dtype)
            self.columns[layer] = columns.view(num_slots, *spec.conv)
            start = end
