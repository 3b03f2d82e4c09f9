"""Quantised checkpoints: which forms are read, and which are refused before a weight is read."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hotset.checkpoint.files import Stored
from hotset.checkpoint.leftovers import is_harmless
from hotset.cost.quantisation import modelopt_algorithm, quant_config
from hotset.errors import ModelError

# Dtypes, in safetensors' words, of plain weights, and of indices and masks. All others are narrow
# or packed.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_INDICES = frozenset({"I64", "U64", "BOOL"})

# What transformers reads a method with, beside itself: modules, and the packages that bring them.
_PACKAGES: dict[str, dict[str, str]] = {
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "awq": {"gptqmodel": "gptqmodel"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "auto-round": {"auto_round": "auto-round"},
    "torchao": {"torchao": "torchao"},
    "quark": {"quark": "amd-quark"},
    "hqq": {"hqq": "hqq"},
    "aqlm": {"aqlm": "aqlm"},
}
_DEQUANTISED = {"fp8", "mxfp8", "fbgemm_fp8", "mxfp4"}  # beside ModelOpt's FP8
_TAKE = "take the model's unquantised weights, a checkpoint in FP8 blocks, or a GGUF file"


def quant_method(fields: Mapping[str, Any]) -> str | None:
    """How a config says the weights are quantised, in transformers' word; None is not at all.

    Args:
        fields: of config.json, as they are there.
    """
    config = quant_config(fields)
    if config is None:
        return None
    if config.get("load_in_8bit") or config.get("load_in_4bit"):
        return "bitsandbytes"
    return str(config.get("quant_method", ""))


def check_config(folder: Path, fields: Mapping[str, Any]) -> None:
    """Refuse a quantisation that cannot be read, by what the small files of a checkpoint say.

    Args:
        folder: is named in messages.
        fields: of config.json and ModelOpt's file, see `cost.quantisation`.

    Raises:
        ModelError: names the method and the way out.
    """
    config, method = quant_config(fields), quant_method(fields)
    if isinstance(fields.get("quantization"), Mapping) and not method:
        bits = fields["quantization"].get("bits")
        raise ModelError(
            f"{folder} holds weights that MLX quantised ({bits} bits), which hotset does not read: "
            f"{_TAKE}"
        )
    if config is None or method is None:
        return
    if method.startswith("modelopt"):
        if (algorithm := modelopt_algorithm(config)) == "FP8":
            return
        raise ModelError(
            f"{folder} holds weights that NVIDIA ModelOpt quantised by {algorithm!r}; of its "
            f"algorithms hotset reads 'FP8': {_TAKE}"
        )
    if not method:
        raise ModelError(
            f"{folder}/config.json has a quantization_config without quant_method, so how its "
            f"weights are to be read is not known: {_TAKE}"
        )
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING and method != "bitsandbytes":
        raise ModelError(
            f"{folder} holds weights quantised by {method!r} (quant_method in config.json), which "
            f"hotset and transformers {transformers.__version__} do not read: {_TAKE}"
        )
    needed = {} if is_dequantised(fields) else _PACKAGES.get(method, {})
    absent = [pip for module, pip in needed.items() if importlib.util.find_spec(module) is None]
    if absent:
        raise ModelError(
            f"{folder} holds weights quantised by {method!r}, which need the package "
            f"{' and '.join(absent)}: pip install {' '.join(absent)}, or {_TAKE}"
        )


def is_dequantised(fields: Mapping[str, Any]) -> bool:
    """Whether a quantised checkpoint is read here, as plain weights; `check_config` took it."""
    method, config = quant_method(fields) or "", quant_config(fields) or {}
    return (
        method in _DEQUANTISED
        or method.startswith("modelopt")
        or int_form(config) is not None
        or narrow_weights(config) is not None
    )


@dataclass(frozen=True, slots=True)
class IntForm:
    """Weights as small integers; see `int_groups`.

    Attributes:
        group: columns that share a scale; None is all of a row.
        has_zeros: whether a group has a zero of its own.
    """

    kind: Literal["awq", "gptq", "packed"]
    bits: int
    group: int | None
    has_zeros: bool

    @property
    def per_word(self) -> int:
        """Codes in 32 bits."""
        return 32 // self.bits


def int_form(config: Mapping[str, Any]) -> IntForm | None:
    """How weights are stored as small integers; None where it is not in a way that is read here.

    Args:
        config: the `quantization_config`.
    """
    method, bits, group = (config.get(key) for key in ("quant_method", "bits", "group_size"))
    group = group if isinstance(group, int) and group > 0 else None
    if method == "awq":
        is_known = str(config.get("version", "gemm")).lower() == "gemm"
        if bits == 4 and is_known and config.get("zero_point", True) is True:
            return IntForm("awq", 4, group, True)
    if method == "gptq":
        is_known = config.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2")
        more = ("dynamic", "is_marlin_format", "rotation", "adapter")  # what they say beside it
        is_whole = not any(map(config.get, more)) and config.get("pack_dtype", "int32") == "int32"
        if bits in (4, 8) and config.get("sym") is True and is_known and is_whole:
            return IntForm("gptq", int(bits), group, False)
    weights = _compressed(config) or {}
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    is_packed = weights.get("format") == "pack-quantized" and weights.get("type") == "int"
    is_in_order = weights.get("actorder") in (None, False, "weight", "static")
    if is_packed and is_in_order and bits in (4, 8) and strategy in ("group", "channel"):
        group = weights.get("group_size") if strategy == "group" else None
        return IntForm("packed", int(bits), group, not weights.get("symmetric", True))
    return None


def narrow_weights(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """How compressed-tensors stored weights in 8 bits each; None where it did something else.

    Returns:
        `float` or `int`, and what shares a scale: (rows, columns), or None for all of a weight.
    """
    weights = _compressed(config) or {}
    kind, strategy = weights.get("type"), str(weights.get("strategy"))
    blocks = {"tensor": None, "channel": (1, None), "block": weights.get("block_structure")}
    is_narrow = weights.get("format") in ("float-quantized", "int-quantized", "naive-quantized")
    is_scaled = weights.get("symmetric", True) and strategy in blocks
    if is_narrow and is_scaled and weights.get("num_bits") == 8 and kind in ("float", "int"):
        return kind, blocks[strategy]
    return None


def _compressed(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What compressed-tensors did to all weights, with its `format`; None where layers differ."""
    groups = config.get("config_groups")
    if config.get("quant_method") != "compressed-tensors" or not isinstance(groups, Mapping):
        return None
    is_dense = ((config.get("sparsity_config") or {}).get("format") or "dense") == "dense"
    if not is_dense or config.get("transform_config"):  # rotations, which layers would undo
        return None
    found = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            return None
        found.append({**weights, "format": group.get("format") or config.get("format")})
    return found[0] if found and all(each == found[0] for each in found) else None


def check_plain(folder: Path, fields: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Refuse narrow or packed tensors that are read as they are: weights without their scales.

    Args:
        folder: is named in messages.
        fields: of config.json.
        stored: what is read as it is.

    Raises:
        ModelError: names the first such tensor.
    """
    narrow = sorted(
        name
        for name, tensor in stored.items()
        if tensor.dtype not in FLOATS
        and (tensor.dtype not in _INDICES or name.endswith(".weight"))
        and not is_harmless(name, tensor.shape, fields)
    )
    if narrow and (method := quant_method(fields)):
        raise ModelError(
            f"{folder}: {narrow[0]} is stored as {stored[narrow[0]].dtype}, which no "
            f"{method.upper()} checkpoint that hotset reads has; take the model's unquantised "
            "weights"
        )
    if narrow:
        raise ModelError(
            f"{folder} stores tensors narrow or packed ({len(narrow)}, first {narrow[0]} as "
            f"{stored[narrow[0]].dtype}), but config.json has no quantization_config that says how "
            f"to read them: {_TAKE}"
        )
