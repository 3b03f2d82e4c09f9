"""Read checkpoints: a folder of safetensors or a GGUF file, to a model in memory."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import torch
import transformers

from hotset.errors import ModelError, TierError
from hotset.model import weights
from hotset.model.expert_disk import ExpertSink

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")

FULL_HASH_BYTES = 4 * 2**30  # checkpoints up to this size are hashed byte for byte
HASH_CHUNK_BYTES = 64 * 2**20
HASH_STRIDE_BYTES = 2**20
HASH_SAMPLE_BYTES = 16 * 2**10

# As compressed-tensors, vLLM and ModelOpt write them.
KV_SCALE_NAME = re.compile(r"\.layers\.(\d+)\.self_attn\.(?:attn\.|[kv]_proj\.|)([kv])_scale$")


def load_folder(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    fp8: bool = False,
    experts: ExpertSink | None = None,
) -> tuple[Any, Any | None]:
    """Load a folder's model, and its tokenizer if it has one.

    On a GPU, or for `fp8`, weights go straight to their place and sibling layers are merged, where
    the checkpoint is plain enough; see `weights.load_in_place`. On the CPU they are the pages of
    the file, which takes no memory at all.

    Args:
        folder: of the checkpoint.
        device: where the weights go.
        dtype: of the weights; None is the checkpoint's.
        fp8: store those of linear layers in 8 bits. A checkpoint that is not plain is loaded in
            `dtype`, for the caller to round.
        experts: where those go that host memory has no room for.

    Raises:
        ModelError: it cannot be loaded; says why.
    """
    if not (folder / "config.json").is_file():
        hint = next((f"; it holds {f.name}: give that file" for f in folder.glob("*.gguf")), "")
        raise ModelError(f"{folder} has no config.json, so it is not a model's folder{hint}")
    files = _weight_files(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(_config_problem(folder, error)) from error
    _check_architecture(config, folder)
    model = None
    if fp8 or device.type == "cuda":
        model = _in_place(folder, files, config, device, dtype or config.dtype, fp8=fp8)
    if model is None:
        if experts is not None:
            _begin(experts, config, dtype)
        options = {}
        if _quantization(config) == "fp8":  # its own kernels are downloads; others refuse
            options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
        with experts.catch_loaded() if experts is not None else contextlib.nullcontext():
            model = _from_pretrained(folder, folder, device, dtype, config=config, **options)
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
    except TierError:  # of experts on disk
        raise
    except Exception as error:  # whatever a bad file makes the libraries raise
        raise ModelError(f"cannot load the weights of {source}: {first_line(error)}") from error
    # Loading fills these with random numbers: a model that runs and speaks nonsense.
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(key) for key in report.get(problem) or ()):
            raise ModelError(
                f"{source} does not fit its config: {len(names)} {problem.replace('_', ' ')}, "
                f"first {names[0]}; the checkpoint is incomplete or of another architecture"
            )
    return model


def _begin(experts: ExpertSink, config: Any, dtype: torch.dtype | None) -> None:
    """Show the sink the shape of what is loaded next, if it is known."""
    dtype = dtype or config.dtype
    if dtype is None or _quantization(config) is not None:
        return
    with torch.device("meta"):
        shape = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    experts.begin(shape)


def _in_place(
    folder: Path,
    files: list[Path],
    config: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    fp8: bool,
) -> Any | None:
    """The model, or None where transformers has to load it."""
    if dtype is None:
        return None
    attention = _first_attention(config)
    try:
        return weights.load_in_place(
            config, folder, files, device, dtype, fp8=fp8, attn_implementation=attention
        )
    except Exception as error:  # whatever a bad file makes the libraries raise
        raise ModelError(f"cannot load the weights of {folder}: {first_line(error)}") from error


def _quantization(config: Any) -> str | None:
    """How the weights of a checkpoint are quantised, in transformers' word."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else None
    return None if method is None else str(method)


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
        raise ModelError(f"cannot load the tokenizer of {source}: {first_line(error)}") from error


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
        return f"{folder}/config.json is not JSON: {first_line(bad)}"
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
    return f"cannot use {folder}/config.json: {first_line(error)}"


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
        raise ModelError(f"{folder}/{WEIGHTS_INDEX} is damaged: {first_line(error)}") from error
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
    for file in _weight_files(source):
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


def first_line(error: Exception) -> str:
    """The first line of an error's message that says anything."""
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
