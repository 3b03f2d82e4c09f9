"""The tensors of a checkpoint as a model takes them: by name, read when asked for, dequantised."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch

from hotset.checkpoint import fp8_blocks, int_groups, mxfp4, quantized
from hotset.checkpoint.files import read_headers, weight_files
from hotset.cost.quantisation import int_form, quant_config


@dataclass(frozen=True, slots=True)
class Dequantised:
    """A weight of several tensors, dequantised on `device` when it is indexed with `...`."""

    parts: tuple[Any, ...]
    dequantise: Callable[..., torch.Tensor]
    device: torch.device
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """As slices of safetensors are read."""
        parts = [part[...].to(self.device) for part in self.parts]
        return self.dequantise(*parts, dtype=self.dtype)[index]


class CheckpointTensors:
    """What the files of a checkpoint hold, with narrow weights and their scales made one.

    Args:
        folder: of the checkpoint, whose headers are read.
        fields: of its config.json.

    Attributes:
        folder: see above.
        stored: by name; narrow weights under the name and shape of what they are read as.
        is_dequantised: whether the checkpoint is quantised, and read here as one that is not.

    Raises:
        ModelError: a file is missing or damaged, narrow weights and their scales do not fit
            together, or there are narrow tensors that are none of them.
    """

    def __init__(self, folder: Path, fields: Mapping[str, Any]) -> None:
        self.folder = folder
        self._all = stored = read_headers(weight_files(folder))
        # By the weight's name: values, scales and what else makes it.
        self._parts: dict[str, tuple[str, ...]] = {}
        self._dequantise: Callable[..., torch.Tensor] = mxfp4.dequantise
        shapes: dict[str, tuple[int, ...]] = {}
        folded: set[str] = set()
        form = fp8_blocks.fp8_format(folder, fields, stored)
        integers = int_form(quant_config(fields) or {})
        self.is_dequantised = quantized.is_dequantised(fields)
        if integers is not None:
            self._parts = int_groups.find_weights(folder, integers, stored)
            self._dequantise = partial(int_groups.dequantise, form=integers)
            for name, (codes, *_) in self._parts.items():
                shapes[name] = int_groups.shape_of(integers, stored[codes])
                folded.update(int_groups.unneeded(integers, name))
        elif form is not None:
            scales = fp8_blocks.pair_scales(folder, form, stored)
            self._parts = {weight: (weight, name) for weight, name in scales.items()}
            self._dequantise = partial(fp8_blocks.dequantise, block=form.block)
            folded.update(name for each in scales for name in fp8_blocks.input_scales(each))
        elif self.is_dequantised:
            self._parts.update(mxfp4.find_blocks(folder, stored))
            shapes = {name: mxfp4.shape_of(stored[of]) for name, (of, *_) in self._parts.items()}
        folded.update(name for parts in self._parts.values() for name in parts)
        self.stored = {name: tensor for name, tensor in stored.items() if name not in folded}
        if self.is_dequantised or quant_config(fields) is None:
            quantized.check_plain(folder, fields, self.stored)
        for name, (first, *_) in self._parts.items():
            shape = shapes.get(name, stored[first].shape)
            self.stored[name] = replace(stored[first], shape=shape)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tensor.shape for name, tensor in self.stored.items()}

    def is_float(self, name: str) -> bool:
        """Whether a tensor is read as plain floats."""
        return name in self._parts or self.stored[name].dtype in quantized.FLOATS

    def is_zero_bias(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros, as GPTQ's tools store for layers that have none."""
        if not name.endswith(".bias") or name not in self._all:
            return False
        with safetensors.safe_open(self._all[name].file, "pt") as tensors:
            return not tensors.get_tensor(name).any()

    @contextlib.contextmanager
    def open(self, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        """All tensors by name, each read when it is indexed with `...`, from any thread.

        Args:
            device: where narrow ones are dequantised; others are on the CPU.
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
                if name not in self._parts:
                    return part(name)
                parts = tuple(part(each) for each in self._parts[name])
                return Dequantised(parts, self._dequantise, device, dtype)

            yield {name: read(name) for name in self.stored}
