"""Configs of bundled models as they are published in few bits, for models with random weights."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hotset.cost.catalog import bundled_config

_GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
QUANTISATIONS: dict[str, dict[str, Any]] = {
    # Of Qwen/Qwen3-30B-A3B-FP8.
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    # What llm-compressor writes for W4A16.
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _GROUP}},
        "ignore": ["lm_head"],
    },
}


def config_file(model: str, quantisation: str | None) -> str:
    """What `load_dummy` takes for a bundled model, quantised in one of `QUANTISATIONS` or not."""
    if quantisation is None:
        return model
    fields, _ = bundled_config(model)
    folder = Path(tempfile.mkdtemp(prefix="narrow-")) / f"{model}-{quantisation}"
    folder.mkdir()
    fields = {**fields, "quantization_config": QUANTISATIONS[quantisation]}
    (folder / "config.json").write_text(json.dumps(fields), "utf-8")
    return str(folder)
