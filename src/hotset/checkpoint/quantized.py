"""Quantised checkpoints: which forms are read, and which are refused before a weight is read."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hotset.checkpoint.files import Stored
from hotset.checkpoint.leftovers import is_harmless
from hotset.cost.quantisation import (
    int_form,
    is_table4,
    modelopt_algorithm,
    narrow_weights,
    nvfp4_kind,
    quant_config,
)
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
_DEQUANTISED = {"fp8", "mxfp8", "fbgemm_fp8", "mxfp4"}  # beside ModelOpt's
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
        if (algorithm := modelopt_algorithm(config)) in ("FP8", "NVFP4"):
            return
        raise ModelError(
            f"{folder} holds weights that NVIDIA ModelOpt quantised by {algorithm!r}; of its "
            f"algorithms hotset reads 'FP8' and 'NVFP4': {_TAKE}"
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
        or nvfp4_kind(config) is not None
        or is_table4(config)
    )


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
