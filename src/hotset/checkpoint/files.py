"""The files of a checkpoint: which they are, and what their headers say."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from hotset.errors import ModelError
from hotset.foreign_text import ForeignTextError, parse_json

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

# As compressed-tensors, vLLM and ModelOpt write them, and AutoFP8.
KV_SCALE_NAME = re.compile(
    r"\.layers\.(\d+)\.self_attn\.(?:(?:attn|[kv]_proj|qkv_proj)\.)?"
    r"([kv])_(?:scale|proj\.output_scale)$"
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, as the file's header says.

    Attributes:
        file: it is in.
        dtype: in safetensors' word, such as `BF16`.
        shape: of the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        bits = re.search(r"\d+", self.dtype)  # `BOOL` alone has none
        return math.prod(self.shape) * (8 if bits is None else int(bits[0])) // 8


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """What safetensors files hold, by name; reads no weight.

    Raises:
        ModelError: a file is damaged.
    """
    stored = {}
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # it is no dictionary
                    tensor = tensors.get_slice(name)
                    stored[name] = Stored(file, tensor.get_dtype(), tuple(tensor.get_shape()))
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(
                f"cannot load the weights of {file.parent}: {file.name} is damaged ({error})"
            ) from error
    return stored


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json.

    Raises:
        ModelError: there is none, or it is no JSON object. A folder of another format is named as
            what it is.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json: {_what_it_is(folder)}")
    try:
        fields = parse_json(file.read_bytes())
    except ForeignTextError as error:
        raise ModelError(f"{file} {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ModelError(f"{file} names no model_type, so it is not a transformers config")
    if (folder / "adapter_config.json").is_file():  # transformers applies it where peft is there
        raise ModelError(
            f"{folder} holds {_what_it_is(folder).removeprefix('it is ')}; or, where the model is "
            "to be served without it, take adapter_config.json away"
        )
    if fields.get("transformers_weights"):
        raise ModelError(
            f"{file} names files of weights in transformers_weights, which hotset does not follow: "
            f"name them {WEIGHTS}"
        )
    return fields


def check_generation_config(folder: Path) -> None:
    """Refuse a damaged generation_config.json: transformers would go on without its end tokens.

    Raises:
        ModelError: there is one that is no JSON object.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    try:
        fields = parse_json(file.read_bytes())
    except ForeignTextError as error:
        raise ModelError(f"{file} {error}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{file} is not a JSON object; take it away, or the model's own")


def _what_it_is(folder: Path) -> str:
    """Say what a folder without config.json is, and the way out."""
    if (folder / "adapter_config.json").is_file():
        base = _base_model(folder)
        return (
            f"it is a LoRA adapter{base}, which hotset does not apply: merge it into its model "
            "(peft's merge_and_unload), save that, and give its folder"
        )
    if (folder / "params.json").is_file() or next(folder.glob("consolidated*"), None):
        return (
            "it is in the format of Mistral's or Meta's own code (params.json, consolidated.*): "
            "take the same model in transformers' format (config.json, model*.safetensors)"
        )
    if file := next(folder.glob("*.gguf"), None):
        return f"it is no folder of a model; it holds {file.name}: give that file"
    return "it is no folder of a model"


def _base_model(folder: Path) -> str:
    try:
        name = parse_json((folder / "adapter_config.json").read_bytes()).get(
            "base_model_name_or_path"
        )
    except (OSError, ValueError, AttributeError):
        return ""
    return f" of {name}" if name else ""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name, all of them present."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        raise ModelError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}{_others(folder)}")
    try:
        shards = sorted(
            set(parse_json((folder / WEIGHTS_INDEX).read_bytes())["weight_map"].values())
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


def _others(folder: Path) -> str:
    """Say which weights of other formats a folder holds, and the way out."""
    if pickled := next(
        (f for kind in ("bin", "pt", "pth") for f in folder.glob(f"*.{kind}")), None
    ):
        return (
            f"; it has {pickled.name}, a format that may run code, which hotset does not read: "
            "save the model again as safetensors (transformers' save_pretrained)"
        )
    if file := next(folder.glob("consolidated*.safetensors"), None):
        return (
            f"; it has {file.name}, in the format of Mistral's own code: take the same model in "
            "transformers' format (model*.safetensors)"
        )
    if file := next(folder.glob("*.gguf"), None):
        return f"; it has {file.name}: give that file"
    return ""


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
