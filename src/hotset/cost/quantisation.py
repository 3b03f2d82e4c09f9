"""What the small files of a checkpoint say about quantised weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hotset.foreign_text import parse_json

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
