"""The tensors of a checkpoint as a model takes them: by name, read when asked for, dequantised."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from hotset.model import fp8_blocks
from hotset.model.checkpoint_files import Stored

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight of 8-bit floats, dequantised on `device` when it is indexed with `...`."""

    weight: Any
    scales: Any
    block: fp8_blocks.Block
    device: torch.device
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """As slices of safetensors are read."""
        weight, scales = self.weight[...].to(self.device), self.scales[...].to(self.device)
        return fp8_blocks.dequantise(weight, scales, self.block, self.dtype)[index]


class CheckpointTensors:
    """What the files of a checkpoint hold, scales of 8-bit weights folded into these.

    Args:
        folder: of the checkpoint.
        fields: of its config.json.
        stored: what the headers of its files say.

    Attributes:
        stored: by name, without the scales that are folded.

    Raises:
        ModelError: 8-bit weights and their scales do not fit together.
    """

    def __init__(
        self, folder: Path, fields: Mapping[str, Any], stored: Mapping[str, Stored]
    ) -> None:
        self._all = stored
        self._form = fp8_blocks.fp8_format(folder, fields)
        self._scales = (
            {} if self._form is None else fp8_blocks.pair_scales(folder, self._form, stored)
        )
        folded = set(self._scales.values())
        for weight in self._scales:
            folded.update(fp8_blocks.input_scales(weight))
        self.stored = {name: tensor for name, tensor in stored.items() if name not in folded}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tensor.shape for name, tensor in self.stored.items()}

    @property
    def is_dequantised(self) -> bool:
        """Whether the checkpoint is quantised, and read here as one that is not."""
        return self._form is not None

    def is_float(self, name: str) -> bool:
        """Whether a tensor is read as plain floats."""
        return name in self._scales or self.stored[name].dtype in _FLOATS

    @contextlib.contextmanager
    def open(self, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        """All tensors by name, each read when it is indexed with `...`, from any thread.

        Args:
            device: where 8-bit ones are dequantised; others are on the CPU.
            dtype: of those; others are as stored.
        """
        with contextlib.ExitStack() as files:
            opened = {
                file: files.enter_context(safetensors.safe_open(file, "pt"))
                for file in {tensor.file for tensor in self._all.values()}
            }

            def part(name: str) -> Any:
                return opened[self._all[name].file].get_slice(name)

            def read(name: str) -> Any:
                if self._form is None or name not in self._scales:
                    return part(name)
                scales = part(self._scales[name])
                return Fp8Weight(part(name), scales, self._form.block, device, dtype)

            yield {name: read(name) for name in self.stored}
