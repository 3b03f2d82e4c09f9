"""The tensors of a checkpoint as a model takes them: by name, read when asked for, dequantised."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch

from hotset.checkpoint import bnb, fp8_blocks, int_groups, mxfp4, nvfp4, quantized
from hotset.checkpoint.files import read_headers, weight_files
from hotset.cost.quantisation import IntForm, int_form, is_table4, nvfp4_kind, quant_config
from hotset.errors import ModelError
from hotset.kernels.narrow_forms import can_read
from hotset.linear.narrow_matrix import Planes
from hotset.weight_format import MXFP4, NVFP4, Code, Scale, WeightFormat

_SCALES: dict[str, Scale] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Kernels multiply by more on the way. Weights of a model are far below 1.
_LARGEST_EXPONENT = 128  # of e8m0: 2
_LARGEST_SCALE = 2.0**100


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
        input_bits: of what weights that stay narrow are multiplied with; see `WeightFormat`.

    Attributes:
        folder: see above.
        stored: by name; narrow weights under the name and shape of what they are read as.
        is_dequantised: whether the checkpoint is quantised, and read here as one that is not.
        narrow_format: how it stores the weights that it quantised, where their own bytes can be
            kept; None where they are dequantised at any rate.

    Raises:
        ModelError: a file is missing or damaged, narrow weights and their scales do not fit
            together, there are narrow tensors that are none of them, or inputs cannot be in 8 bits.
    """

    def __init__(
        self, folder: Path, fields: Mapping[str, Any], *, input_bits: Literal[16, 8] = 16
    ) -> None:
        self.folder = folder
        self._all = stored = read_headers(weight_files(folder))
        # By the weight's name: values, scales and what else makes it.
        self._parts: dict[str, tuple[str, ...]] = {}
        self._dequantise: Callable[..., torch.Tensor] = mxfp4.dequantise
        self._planes: Callable[..., Planes] = mxfp4.planes
        self.narrow_format: WeightFormat | None = None
        self.is_dequantised = quantized.is_dequantised(fields)
        shapes, folded = self._find_parts(fields)
        folded.update(name for parts in self._parts.values() for name in parts)
        self.stored = {name: tensor for name, tensor in stored.items() if name not in folded}
        if self.is_dequantised or quant_config(fields) is None:
            quantized.check_plain(folder, fields, self.stored)
        for name, (first, *_) in self._parts.items():
            shape = shapes.get(name, stored[first].shape)
            self.stored[name] = replace(stored[first], shape=shape)
        if input_bits == 8:
            self.narrow_format = self._with_rounded_inputs(quant_config(fields) or {})

    def _find_parts(self, fields: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """Find out how weights are stored; their shapes, and the names of what is not needed."""
        stored, config = self._all, quant_config(fields) or {}
        shapes: dict[str, tuple[int, ...]] = {}
        unneeded: set[str] = set()
        kind, integers = nvfp4_kind(config), int_form(config)
        form = None if kind else fp8_blocks.fp8_format(self.folder, fields, stored)
        if integers is not None:
            self._parts = int_groups.find_weights(self.folder, integers, stored)
            self._dequantise = partial(int_groups.dequantise, form=integers)
            self._planes = partial(int_groups.planes, form=integers)
            self.narrow_format = self._int_format(integers, config)
            for name, (codes, *_) in self._parts.items():
                shapes[name] = int_groups.shape_of(integers, stored[codes])
                unneeded.update(int_groups.unneeded(integers, name))
        elif kind is not None:
            self._parts = nvfp4.find_weights(self.folder, kind, stored)
            self._dequantise = partial(nvfp4.dequantise, kind=kind)
            self._planes = partial(nvfp4.planes, kind=kind)
            self.narrow_format = NVFP4
            for name, (codes, *_) in self._parts.items():
                shapes[name] = nvfp4.shape_of(stored[codes])
                unneeded.add(nvfp4.unneeded(kind, name))
        elif is_table4(config):
            self._parts, states = bnb.find_weights(self.folder, stored)
            self._dequantise, self._planes = bnb.dequantise, bnb.planes
            self.narrow_format = bnb.format_of(states)
            shapes = {name: state.shape for name, state in states.items()}
        elif form is not None:
            scales = fp8_blocks.pair_scales(self.folder, form, stored)
            self._parts = {weight: (weight, name) for weight, name in scales.items()}
            self._dequantise = partial(fp8_blocks.dequantise, block=form.block)
            self._planes = partial(fp8_blocks.planes, block=form.block)
            if not self._has("F8_E5M2"):
                code: Code = "e4m3" if form.dtypes == fp8_blocks.FLOATS else "int8"
                self.narrow_format = WeightFormat(code, "float32", *(form.block or (None, None)))
            unneeded.update(name for each in scales for name in fp8_blocks.input_scales(each))
        elif self.is_dequantised:
            self._parts.update(mxfp4.find_blocks(self.folder, stored))
            self.narrow_format = MXFP4 if self._parts else None
            shapes = {name: mxfp4.shape_of(stored[of]) for name, (of, *_) in self._parts.items()}
        return shapes, unneeded

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tensor.shape for name, tensor in self.stored.items()}

    def is_float(self, name: str) -> bool:
        """Whether a tensor is read as plain floats."""
        return name in self._parts or self.stored[name].dtype in quantized.FLOATS

    @property
    def narrow_names(self) -> frozenset[str]:
        """The weights that are stored in `narrow_format`."""
        return frozenset(self._parts) if self.narrow_format is not None else frozenset()

    @property
    def dequantised_bytes(self) -> dict[str, int]:
        """What each weight of several tensors takes in the files."""
        return {
            name: sum(self._all[part].num_bytes for part in parts)
            for name, parts in self._parts.items()
        }

    def is_zero_bias(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros, as GPTQ's tools store for layers that have none."""
        if not name.endswith(".bias") or name not in self._all:
            return False
        with safetensors.safe_open(self._all[name].file, "pt") as tensors:
            return not tensors.get_tensor(name).any()

    @contextlib.contextmanager
    def open(
        self, device: torch.device, dtype: torch.dtype, *, without: Collection[str] = ()
    ) -> Iterator[dict[str, Any]]:
        """All tensors by name, each read when it is indexed with `...`, from any thread.

        Args:
            device: where narrow ones are dequantised; others are on the CPU.
            dtype: of those; others are as stored.
            without: names that are left out.
        """
        with self._open_parts() as part:

            def read(name: str) -> Any:
                if name not in self._parts:
                    return part(name)
                parts = tuple(part(each) for each in self._parts[name])
                return Dequantised(parts, self._dequantise, device, dtype)

            yield {name: read(name) for name in self.stored if name not in without}

    @contextlib.contextmanager
    def open_narrow(
        self, device: torch.device | None = None
    ) -> Iterator[Callable[[str, int | None], Planes]]:
        """Reads the planes of a weight of `narrow_names`, or of one of those stacked in it.

        They are made on `device`, by default on the CPU. Any thread may read. What it gives raises
        ModelError where a number is none.
        """
        with self._open_parts() as part:

            def read(name: str, index: int | None) -> Planes:
                slices = (part(each) for each in self._parts[name])
                stored = (s[...] if index is None else s[index] for s in slices)
                try:
                    planes = self._planes(*(each.to(device or "cpu") for each in stored))
                except ValueError as error:
                    raise ModelError(f"{self.folder}: {name}: {error}") from error
                self._check_numbers(name, planes)
                return planes

            yield read

    @contextlib.contextmanager
    def _open_parts(self) -> Iterator[Callable[[str], Any]]:
        """Slices of the stored tensors by their own names."""
        with contextlib.ExitStack() as files:
            opened = {
                file: files.enter_context(safetensors.safe_open(file, "pt"))
                for file in {tensor.file for tensor in self._all.values()}
            }
            yield lambda name: opened[self._all[name].file].get_slice(name)

    def _check_numbers(self, name: str, planes: Planes) -> None:
        """Refuse what is not a number: kernels would make one of it."""
        assert self.narrow_format is not None
        codes, scales, more = planes
        if self.narrow_format.scale == "e8m0":
            is_bad = (scales > _LARGEST_EXPONENT).any()
        else:
            is_bad = ~(scales.float().abs() <= _LARGEST_SCALE).all()
        if self.narrow_format.code == "e4m3":
            is_bad |= (codes & 127 == 127).any()
        is_scale = self.narrow_format.has_row_scales or self.narrow_format.code == "table4"
        if more is not None and is_scale:
            is_bad |= ~(more.abs() <= _LARGEST_SCALE).all()
        if is_bad:
            most = "2" if self.narrow_format.scale == "e8m0" else "2**100"
            raise ModelError(
                f"{self.folder}: {name} has codes or scales that are no numbers, or beyond {most}; "
                "the checkpoint is damaged"
            )

    def _with_rounded_inputs(self, config: Mapping[str, Any]) -> WeightFormat:
        """`narrow_format`, whose products round their inputs."""
        if self.narrow_format is None or self.narrow_format.code != "e4m3":
            name = "none in few bits" if self.narrow_format is None else self.narrow_format.name
            raise ModelError(
                f"{self.folder}: activations is 8, for weights in 8-bit floats, and its weights "
                f"are {name}; leave activations out, or take a checkpoint in FP8"
            )
        if config.get("scale_fmt") == "ue8m0":
            raise ModelError(
                f"{self.folder}: activations is 8, and config.json asks for scales of inputs that "
                "are powers of 2 (scale_fmt ue8m0), which hotset does not round to; leave "
                "activations out"
            )
        form = replace(self.narrow_format, input_bits=8)
        if not can_read(form):
            raise ModelError(
                f"{self.folder}: activations is 8, and no kernel multiplies {form.name}; leave "
                "activations out"
            )
        return form

    def _int_format(self, form: IntForm, config: Mapping[str, Any]) -> WeightFormat | None:
        """Of integers whose groups are in order, and whose scales all have one dtype."""
        if form.kind == "gptq" and config.get("desc_act") is not False:
            return None
        dtypes = {self._all[scales].dtype for _, scales, *_ in self._parts.values()}
        if len(dtypes) != 1 or (scale := _SCALES.get(dtypes.pop())) is None:
            return None
        if form.bits == 4:
            return WeightFormat("int4", scale, 1, form.group, form.has_zeros)
        return None if form.has_zeros else WeightFormat("int8", scale, 1, form.group)

    def _has(self, dtype: str) -> bool:
        return any(tensor.dtype == dtype for tensor in self._all.values())
