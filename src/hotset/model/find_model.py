"""Where a model is: a folder, a file, or the hub, from which it is fetched."""

import contextlib
import difflib
import os
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from hotset.errors import ModelError
from hotset.libraries import first_line, quiet
from hotset.model import checkpoint, default_model, upcycled_model

HUB_FILES = ["*.json", "*.jinja", "model*.safetensors", "*.model", "*.txt", "*.tiktoken"]
_SMALL_FILES = ["config.json", "hf_quant_config.json", "adapter_config.json", "params.json"]


def find_model(name: str | None, *, narrow: bool = False) -> tuple[Path, str]:
    """The folder or GGUF file of a model, fetched first where it is not here; and a short name.

    Args:
        name: as users give it; None is the default model.
        narrow: prefer the GGUF file of a model that has both.
    """
    if name is None or name == default_model.NAME:
        found = default_model.ensure_gguf() if narrow else default_model.ensure()
        return found, default_model.NAME
    if name == upcycled_model.NAME:
        return upcycled_model.ensure(), upcycled_model.NAME
    path = Path(name).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{name} is not a model: expected a folder with config.json and safetensors "
                "weights, a .gguf file, or a hub id"
            )
        return path, path.stem
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or path.suffix.lower() == ".gguf":
        raise ModelError(f"{name}: no such file or folder{_near(path)}")
    return _download(name, path), name


def _check_config(hub_id: str) -> None:
    """Refuse a model that cannot run, by its config alone, before weights are downloaded."""
    with quiet():
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_SMALL_FILES))
    try:
        checkpoint.read_architecture(folder)
    except ModelError as error:  # the folder is one of the cache: the user knows the id
        raise ModelError(str(error).replace(str(folder), hub_id)) from error


def _near(path: Path) -> str:
    """A hint at a file or folder beside `path` with a name like it."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return f"; there is no folder {path.parent} either"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _download(hub_id: str, path: Path) -> Path:
    """Get a checkpoint from the hub, or from its cache, without weights of other formats."""
    files: list[Any] = []
    try:
        # Without the hub there is nothing to announce: the cache has the model, or the call below
        # says why not.
        with quiet(), contextlib.suppress(hub_errors.DryRunError):
            files = huggingface_hub.snapshot_download(
                hub_id, allow_patterns=HUB_FILES, dry_run=True
            )
        missing_bytes = sum(file.file_size or 0 for file in files if file.will_download)
        if missing_bytes:
            _check_config(hub_id)
            print(
                f"hotset: downloading {hub_id} from the hub, {missing_bytes / 1e9:.2f} GB, "
                f"into {huggingface_hub.constants.HF_HUB_CACHE}",
                file=sys.stderr,
            )
        with quiet():
            return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except hub_errors.GatedRepoError as error:
        raise ModelError(
            f"model {hub_id} is gated: accept its terms on its hub page, then log in "
            "with `hf auth login`"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"model {hub_id!r} is neither a local folder or file{_near(path)} nor a hub id one "
            "can see; check the spelling, or log in with `hf auth login` if it is private"
        ) from error
    except hub_errors.HFValidationError as error:
        raise ModelError(
            f"model {hub_id!r} is no local folder or file{_near(path)} and cannot be a hub id"
        ) from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"model {hub_id!r} is no local folder or file{_near(path)} and the hub cannot be "
            "reached; give a folder or a .gguf file, or no model for the default one"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot download {hub_id}: {first_line(error)}") from error
