"""Read checkpoints: a folder of safetensors or a GGUF file, to a model in memory."""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from hotset.errors import ModelError, TierError
from hotset.model import weights
from hotset.model.checkpoint_files import weight_files
from hotset.model.expert_disk import ExpertSink

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")


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
    files = weight_files(folder)
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
