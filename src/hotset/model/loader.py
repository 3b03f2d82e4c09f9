"""Find a model, load it, and say what it is: the only module that reads checkpoints."""

import contextlib
import difflib
import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import errors as hub_errors

from hotset.errors import ConfigError, ModelError
from hotset.model import default_model

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.jinja", "model*.safetensors", "*.model", "*.txt", "*.tiktoken"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
CONTEXT_LENGTH_NAMES = ("max_position_embeddings", "max_sequence_length", "seq_length")

FULL_HASH_BYTES = 4 * 2**30  # checkpoints up to this size are hashed byte for byte
HASH_CHUNK_BYTES = 64 * 2**20
HASH_STRIDE_BYTES = 2**20
HASH_SAMPLE_BYTES = 16 * 2**10


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, and what the rest of the engine must know of it.

    Attributes:
        model: the transformers model: in eval mode, no gradients, on its device.
        tokenizer: None where the checkpoint brings none; see `require_tokenizer`.
        name: short, for the API.
        fingerprint: 32 hex digits that change when the config or the weights do; see `fingerprint`.
        eos_token_ids: ids that end an answer, in no particular order.
        max_model_len: the longest context the model was made for, in tokens.
    """

    model: Any
    tokenizer: Any | None
    name: str
    fingerprint: str
    eos_token_ids: tuple[int, ...]
    max_model_len: int

    def require_tokenizer(self) -> Any:
        """Return the tokenizer, or raise ModelError where there is none."""
        if self.tokenizer is None:
            raise ModelError(
                f"model {self.name!r} has no tokenizer files, so it takes token ids only; "
                "put the tokenizer's files (tokenizer.json, ...) into its folder"
            )
        return self.tokenizer


def load_model(name: str | None, *, device: str, dtype: str) -> LoadedModel:
    """Load a model for inference. Prints to stderr only what is downloaded or converted.

    Args:
        name: None for the default model; a folder with `config.json` and safetensors weights;
            a `.gguf` file, which is dequantised; or a hub id.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on the CPU, the checkpoint's own elsewhere), `float32`,
            `bfloat16` or `float16`.

    Raises:
        ModelError: the model cannot be found, read or run; nothing stays in memory.
        ConfigError: there is no such device.
    """
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    source, short_name = _find(name)
    with quiet():
        if source.is_file():
            model, tokenizer = load_gguf(source, target, torch_dtype)
        else:
            model, tokenizer = _load_folder(source, target, torch_dtype)
    model.eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=short_name,
        fingerprint=fingerprint(source),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        max_model_len=_max_model_len(model, tokenizer, short_name),
    )


def resolve_device(device: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device this machine has."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device is {device!r}; expected auto, cpu or cuda") from None
    if target.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; expected auto, cpu or cuda")
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device is 'cuda' but torch finds no NVIDIA GPU here; use cpu")
        count = torch.cuda.device_count()
        if (target.index or 0) >= count:
            raise ConfigError(f"device is {device!r} but this machine has {count} GPUs")
    return target


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """The torch dtype asked for; None is the checkpoint's own."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in names:
        raise ConfigError(f"dtype is {dtype!r}; expected auto, {', '.join(names)}")
    return names[dtype]


def fingerprint(source: Path) -> str:
    """Hash a checkpoint's config and weights: 32 hex digits, independent of names and times.

    Checkpoints up to 4 GiB are hashed byte for byte. Of larger ones, 16 KiB at each MiB are,
    beside each file's size: whatever changes a tensor of a MiB or more as a whole (another
    training, a merge, another quantisation) is seen, an edit of single values may not be.
    """
    if source.is_file():
        files, digest = [source], hashlib.blake2b(digest_size=16)
    else:
        config = json.loads((source / "config.json").read_text())
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        files = _weight_files(source)
        digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    sizes = [file.stat().st_size for file in files]
    take = HASH_STRIDE_BYTES if sum(sizes) <= FULL_HASH_BYTES else HASH_SAMPLE_BYTES
    chunks = [
        (file, start, min(start + HASH_CHUNK_BYTES, size), take)
        for file, size in zip(files, sizes, strict=True)
        for start in range(0, size, HASH_CHUNK_BYTES)
    ]
    digest.update(repr(sizes).encode())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        for chunk_digest in pool.map(_hash_chunk, chunks):
            digest.update(chunk_digest)
    return digest.hexdigest()


def _hash_chunk(chunk: tuple[Path, int, int, int]) -> bytes:
    file, start, end, take = chunk
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb", buffering=0) as handle:
        for position in range(start, end, HASH_STRIDE_BYTES):
            handle.seek(position)
            digest.update(handle.read(min(take, end - position)))
    return digest.digest()


def _find(name: str | None) -> tuple[Path, str]:
    """The folder or GGUF file of a model, fetched first where it is not here; and a short name."""
    if name is None or name == default_model.NAME:
        return default_model.ensure(), default_model.NAME
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
        raise ModelError(f"cannot download {hub_id}: {_first_line(error)}") from error


def _load_folder(
    folder: Path, device: torch.device, dtype: torch.dtype | None
) -> tuple[Any, Any | None]:
    if not (folder / "config.json").is_file():
        hint = next((f"; it holds {f.name}: give that file" for f in folder.glob("*.gguf")), "")
        raise ModelError(f"{folder} has no config.json, so it is not a model's folder{hint}")
    _weight_files(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(_config_problem(folder, error)) from error
    _check_architecture(config, folder)
    model = _from_pretrained(folder, folder, device, dtype, config=config)
    tokenizer = None
    if any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        tokenizer = _load_tokenizer(folder, folder)
    return model, tokenizer


def load_gguf(file: Path, device: torch.device, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Load a GGUF file's model, dequantised, and its tokenizer. Raises ModelError."""
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{file} is not a GGUF file: it does not start with 'GGUF'")
    # Dequantised at load: left packed, the linear layers would need kernels from the hub.
    # The redirect is for a progress bar that heeds no setting.
    with contextlib.redirect_stderr(io.StringIO()):
        model = _from_pretrained(
            file,
            file.parent,
            device,
            dtype,
            gguf_file=file.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    tokenizer = _load_tokenizer(file, file.parent, gguf_file=file.name)
    return model, tokenizer


def _from_pretrained(
    source: Path, folder: Path, device: torch.device, dtype: torch.dtype | None, **options: Any
) -> Any:
    """Load weights straight to `device`; `source` is what messages name."""
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            device_map={"": str(device)},
            attn_implementation=_first_attention(options.get("config")),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # whatever a bad file makes the libraries raise
        raise ModelError(f"cannot load the weights of {source}: {_first_line(error)}") from error
    # Loading fills these with random numbers: a model that runs and speaks nonsense.
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(key) for key in report.get(problem) or ()):
            raise ModelError(
                f"{source} does not fit its config: {len(names)} {problem.replace('_', ' ')}, "
                f"first {names[0]}; the checkpoint is incomplete or of another architecture"
            )
    return model


def _first_attention(config: Any | None) -> str:
    """The attention a model is loaded with; the engine puts its own in place of it."""
    if config is None:
        return "sdpa"
    architecture = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return "sdpa" if getattr(architecture, "_supports_sdpa", False) else "eager"


def _load_tokenizer(source: Path, folder: Path, **options: Any) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **options
        )
    except Exception as error:
        raise ModelError(f"cannot load the tokenizer of {source}: {_first_line(error)}") from error


def _check_architecture(config: Any, folder: Path) -> None:
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{folder} is a {config.model_type!r} model, which transformers "
            f"{transformers.__version__} cannot run as a causal language model"
        )


def _config_problem(folder: Path, error: Exception) -> str:
    """Say in one line why `config.json` cannot be used."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as bad:
        return f"{folder}/config.json is not JSON: {_first_line(bad)}"
    if not isinstance(config, dict) or "model_type" not in config:
        return f"{folder}/config.json names no model_type, so it is not a transformers config"
    if "auto_map" in config:
        return (
            f"{folder} needs Python code of its own (auto_map in config.json), which hotset "
            "does not run; use a model whose architecture transformers has"
        )
    if config["model_type"] not in transformers.CONFIG_MAPPING:
        return (
            f"{folder} is a {config['model_type']!r} model, which transformers "
            f"{transformers.__version__} does not know; a newer transformers may"
        )
    return f"cannot use {folder}/config.json: {_first_line(error)}"


def _weight_files(folder: Path) -> list[Path]:
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
        raise ModelError(f"{folder}/{WEIGHTS_INDEX} is damaged: {_first_line(error)}") from error
    files = [folder / shard for shard in shards]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{folder} is incomplete: {len(absent)} of {len(files)} weight files are missing, "
            f"first {absent[0]}"
        )
    return files


def _eos_token_ids(model: Any, tokenizer: Any | None) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for holder in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        for token_id in ids if isinstance(ids, list | tuple) else [ids]:
            if token_id is not None:
                found[int(token_id)] = None
    return tuple(found)


def _max_model_len(model: Any, tokenizer: Any | None, name: str) -> int:
    config = model.config.get_text_config()
    for key in CONTEXT_LENGTH_NAMES:
        if isinstance(length := getattr(config, key, None), int) and length > 0:
            return length
    length = getattr(tokenizer, "model_max_length", None)
    if isinstance(length, int) and length < 2**31:  # transformers writes 1e30 for "none"
        return length
    raise ModelError(
        f"the config of {name} names no context length; add max_position_embeddings to it"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings and progress bars off the user's terminal.

    What matters in them is checked and raised here instead.
    """
    logging, hub_logging = transformers.utils.logging, huggingface_hub.logging
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()  # the hub's too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if had_bars:
            logging.enable_progress_bar()
