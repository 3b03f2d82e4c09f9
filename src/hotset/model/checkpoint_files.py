"""The files of a checkpoint: which they are, and what their headers say."""

import json
import math
import re
from pathlib import Path

import safetensors

from hotset.errors import ModelError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

# As compressed-tensors, vLLM and ModelOpt write them.
KV_SCALE_NAME = re.compile(r"\.layers\.(\d+)\.self_attn\.(?:attn\.|[kv]_proj\.|)([kv])_scale$")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name, all of them present."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        other = next((f"; it has {f.name}" for f in folder.glob("*.bin")), "")
        raise ModelError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}{other}")
    try:
        shards = sorted(
            set(json.loads((folder / WEIGHTS_INDEX).read_text())["weight_map"].values())
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}/{WEIGHTS_INDEX} is damaged: {error}") from error
    files = [folder / shard for shard in shards]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{folder} is incomplete: {len(absent)} of {len(files)} weight files are missing, "
            f"first {absent[0]}"
        )
    return files


def kv_scales(source: Path, num_layers: int) -> tuple[tuple[float, float], ...] | None:
    """What each layer's keys and values were divided by when the checkpoint was calibrated.

    They are scalars of names such as `model.layers.0.self_attn.k_scale`.

    Returns:
        A (key scale, value scale) for each layer, 1 for what is not named; None where none is.

    Raises:
        ModelError: a scale is not a number above 0.
    """
    if source.is_file():
        return None
    found: dict[tuple[int, str], float] = {}
    for file in weight_files(source):
        with safetensors.safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dictionary
                if not (match := KV_SCALE_NAME.search(name)):
                    continue
                scale = tensors.get_tensor(name).float()
                if scale.numel() != 1 or not 0 < scale.item() < math.inf:
                    raise ModelError(f"{source}: {name} is {scale.tolist()}, expected one above 0")
                found[int(match[1]), match[2]] = scale.item()
    if not found:
        return None
    return tuple((found.get((i, "k"), 1.0), found.get((i, "v"), 1.0)) for i in range(num_layers))
