"""Finding a model's config: bundled, in a folder, a file, or a hub id that is already cached."""

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any

from hotset.cost.families import shape_from_config
from hotset.cost.json_files import read_json
from hotset.cost.quantisation import with_modelopt, without_quantisation
from hotset.cost.shape import ModelShape
from hotset.errors import PlanError
from hotset.foreign_text import parse_json

_ALIASES = {
    "llama-3.1-8b": "llama-3-8b",
    "llama-3.1-70b": "llama-3-70b",
    "llama-3-405b": "llama-3.1-405b",
    "deepseek-r1": "deepseek-v3",
    "glm-5.1": "glm-5",
    "qwen3.6-35b-a3b": "qwen3.5-35b-a3b",
    "smollm2": "smollm2-135m",
}


def bundled_models() -> list[str]:
    """Names of the models whose facts come with hotset."""
    folder = resources.files("hotset.cost") / "models"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".json"))


def bundled_config(name: str) -> tuple[dict[str, Any], str]:
    """The config of a bundled model, as the hub has it, and where it comes from."""
    text = (resources.files("hotset.cost") / "models" / f"{name}.json").read_text("utf-8")
    config: dict[str, Any] = parse_json(text)
    return config, config.pop("_source")


def load_model(name: str, weights: str | None = None) -> ModelShape:
    """The shape of a model, without loading a weight or touching the network.

    Args:
        name: see `find_config`.
        weights: how weights are stored, see `ModelShape.with_weights`; None is as the config says.

    Raises:
        PlanError: there is no such model here, or its config cannot be read or is not known.
    """
    fields, short, source = find_config(name)
    if weights is None:
        return shape_from_config(fields, short, source)
    if isinstance(fields, dict):  # how they were quantised need not be known
        fields = without_quantisation(fields)
    return shape_from_config(fields, short, source).with_weights(weights)


def find_config(name: str) -> tuple[dict[str, Any], str, str]:
    """The config of a model, its short name, and where it comes from.

    Args:
        name: a bundled name, a folder with a config.json, a config.json, or the id of a model in
            the local hub cache.

    Raises:
        PlanError: there is no such model here, or its config cannot be read.
    """
    normal = re.sub(r"[\s_]+", "-", name.strip().lower())
    normal = _ALIASES.get(normal, normal)
    if normal in bundled_models():
        config, source = bundled_config(normal)
        return config, normal, source
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise PlanError(f"folder {name} has no config.json; expected a model folder")
        return _read(path), name, str(path)
    if path.is_file():
        return _read(path), name, str(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        cached = _cached_config(name)
        if cached is not None:
            return _read(cached), name, f"hub cache: {cached}"
    near = difflib.get_close_matches(normal.rsplit("/", 1)[-1], bundled_models(), n=3, cutoff=0.4)
    hint = f"near it: {', '.join(near)}" if near else f"bundled: {', '.join(bundled_models())}"
    raise PlanError(
        f"model {name!r} is neither bundled, nor a folder or config.json, nor in the hub cache; "
        f"{hint}"
    )


def _cached_config(repo_id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(repo_id, "config.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(path, "config")
    return with_modelopt(path.parent, config) if isinstance(config, dict) else config
