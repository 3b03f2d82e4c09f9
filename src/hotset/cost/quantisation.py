"""What the small files of a checkpoint say about quantised weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hotset.foreign_text import parse_json
from hotset.weight_format import FP8_ROW, MXFP4, NF4, NVFP4, WeightFormat

MODELOPT_FILE = "hf_quant_config.json"  # of NVIDIA ModelOpt; config.json need not name it


def quant_config(fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a config, or of its text part; None where there is none."""
    for part in (fields, fields.get("text_config")):
        config = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(config, Mapping) and config:
            return config
    return None


def without_quantisation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the same model with plain weights."""
    plain = {key: value for key, value in fields.items() if key != "quantization_config"}
    text = plain.get("text_config")
    return {**plain, "text_config": without_quantisation(text)} if isinstance(text, dict) else plain


def with_modelopt(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` of config.json, with the quantisation that only ModelOpt's own file tells of."""
    file = folder / MODELOPT_FILE
    if quant_config(fields) is not None or not file.is_file():
        return fields
    try:
        quantization = parse_json(file.read_bytes())["quantization"]
        if quantization["quant_algo"] is None:  # KV has scales, weights are as they were
            return fields
    except (OSError, ValueError, KeyError, TypeError):
        quantization = {"quant_algo": f"{MODELOPT_FILE}, which is damaged"}
    return {**fields, "quantization_config": {"quant_method": "modelopt", **quantization}}


def modelopt_algorithm(config: Mapping[str, Any]) -> str:
    """What ModelOpt did to the weights, in its word, by a `quantization_config`."""
    inner = config.get("quantization")  # older files have it one level below
    return str((inner if isinstance(inner, Mapping) else config).get("quant_algo"))


def stored_format(config: Mapping[str, Any]) -> WeightFormat | None:
    """How a checkpoint stores the matrices that it quantised; None where that is not known.

    The dtype of scales is what its tools write: the files may have another.

    Args:
        config: the `quantization_config`.
    """
    method = config.get("quant_method")
    if method in ("fp8", "fbgemm_fp8") or (
        method == "modelopt" and modelopt_algorithm(config) == "FP8"
    ):
        block = config.get("weight_block_size")
        if isinstance(block, list | tuple) and len(block) == 2:
            return WeightFormat("e4m3", "float32", *block)
        return FP8_ROW
    if method == "mxfp4":
        return MXFP4
    if nvfp4_kind(config) is not None:
        return NVFP4
    if is_table4(config):
        return NF4
    if (form := int_form(config)) is not None:
        scale: Literal["bfloat16", "float16"] = "bfloat16" if form.kind == "packed" else "float16"
        code: Literal["int4", "int8"] = "int4" if form.bits == 4 else "int8"
        return WeightFormat(code, scale, 1, form.group, form.has_zeros)
    if (narrow := narrow_weights(config)) is not None:
        kind, block = narrow
        rows, columns = block or (None, None)
        return WeightFormat("e4m3" if kind == "float" else "int8", "float32", rows, columns)
    return None


def is_table4(config: Mapping[str, Any]) -> bool:
    """Whether weights are 4-bit numbers of a table, as bitsandbytes stores them.

    Args:
        config: the `quantization_config`.
    """
    kind = config.get("bnb_4bit_quant_type", "fp4")
    storage = config.get("bnb_4bit_quant_storage", "uint8")
    return config.get("load_in_4bit") is True and kind in ("nf4", "fp4") and storage == "uint8"


Nvfp4Kind: TypeAlias = Literal["modelopt", "packed"]


def nvfp4_kind(config: Mapping[str, Any]) -> Nvfp4Kind | None:
    """The naming of NVFP4 weights in the files; None where none are stored so.

    Args:
        config: the `quantization_config`.
    """
    if str(config.get("quant_method")).startswith("modelopt"):
        return "modelopt" if modelopt_algorithm(config) == "NVFP4" else None
    weights = _compressed(config) or {}
    is_packed = weights.get("format") == "nvfp4-pack-quantized" and weights.get("type") == "float"
    is_grouped = weights.get("num_bits") == 4 and weights.get("group_size", 16) == 16
    is_known = weights.get("strategy") == "tensor_group" and weights.get("symmetric", True)
    return "packed" if is_packed and is_grouped and is_known else None


@dataclass(frozen=True, slots=True)
class IntForm:
    """Weights as small integers; see `checkpoint.int_groups`.

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
