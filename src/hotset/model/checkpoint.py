"""Read checkpoints: a folder of safetensors or a GGUF file, to a model in memory."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from hotset.errors import ModelError, TierError
from hotset.model import leftovers, quantized, weights
from hotset.model.checkpoint_files import read_config, read_headers, weight_files
from hotset.model.checkpoint_tensors import CheckpointTensors
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
    fields = read_config(folder)
    quantized.check_config(folder, fields)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(_config_problem(folder, fields, error)) from error
    _check_architecture(config, folder)
    stored = read_headers(weight_files(folder))
    quantized.check_stored(folder, fields, stored)
    tensors = CheckpointTensors(folder, fields, stored)
    if tensors.is_dequantised:
        _forget_quantization(config)
    model = None
    if fp8 or device.type == "cuda":
        model = _in_place(folder, fields, tensors, config, device, dtype or config.dtype, fp8=fp8)
    if model is None:
        if experts is not None:
            _begin(experts, config, dtype)
        with experts.catch_loaded() if experts is not None else contextlib.nullcontext():
            model = _with_transformers(folder, fields, tensors, config, device, dtype)
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


def _with_transformers(
    folder: Path,
    fields: Mapping[str, Any],
    tensors: CheckpointTensors,
    config: Any,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Any:
    """What `from_pretrained` makes of a folder, 8-bit blocks dequantised on their way."""
    if not tensors.is_dequantised:
        return _from_pretrained(folder, folder, device, dtype, fields, tensors, config=config)
    # Not by transformers: it takes the block for what divides the rows evenly, and its kernels for
    # 8-bit weights are downloads.
    dtype = dtype or config.dtype or torch.bfloat16
    with tensors.open(device, dtype) as reads:
        model = _from_pretrained(
            folder, None, device, dtype, fields, tensors, config=config, state_dict=reads
        )
    weights.read_generation_config(model, folder)
    return model


def _from_pretrained(
    source: Path,
    folder: Path | None,
    device: torch.device,
    dtype: torch.dtype | None,
    fields: Mapping[str, Any] | None = None,
    tensors: CheckpointTensors | None = None,
    **options: Any,
) -> Any:
    """Load weights straight to `device`; `source` is what messages name.

    `fields` of config.json and `tensors` tell which of these may be left over.
    """
    config = options.get("config")
    architecture = _architecture(config) if config else transformers.AutoModelForCausalLM
    try:
        model, report = architecture.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            device_map={"": str(device)},
            attn_implementation=_first_attention(config),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    except TierError:  # of experts on disk
        raise
    except Exception as error:  # whatever a bad file makes the libraries raise
        raise ModelError(
            f"cannot load the weights of {source}: {_loading_problem(error)}"
        ) from error
    if problem := _misfit(report, fields or {}, tensors.shapes if tensors is not None else {}):
        raise ModelError(f"{source} does not fit its config: {problem}")
    return model


def _misfit(
    report: Mapping[str, Any], fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """What transformers found wrong with a checkpoint, and went on with; None is nothing."""
    # Loading fills these two with random numbers: a model that runs and speaks nonsense.
    if names := sorted(str(key) for key in report["missing_keys"]):
        return (
            f"{len(names)} missing keys, first {names[0]}; the checkpoint is incomplete or of "
            "another architecture"
        )
    if wrong := sorted(report["mismatched_keys"]):
        name, found, expected = wrong[0]
        return (
            f"{len(wrong)} tensors have other shapes, first {name}: stored {list(found)}, "
            f"expected {list(expected)}; the config is of another model, or lacks a setting"
        )
    names = leftovers.leftovers(report["unexpected_keys"], shapes, fields)
    return leftovers.leftovers_problem(names) if names else None


def _loading_problem(error: Exception) -> str:
    """Say in one line why transformers could not load weights."""
    line = first_line(error)
    if "automatic conversion of the weights" in line:  # points at a report that is not shown
        return (
            "tensors that belong together (of experts, say) differ in shape or number; the "
            "checkpoint is damaged or of another architecture"
        )
    return line


def _begin(experts: ExpertSink, config: Any, dtype: torch.dtype | None) -> None:
    """Show the sink the shape of what is loaded next, if it is known."""
    dtype = dtype or config.dtype
    if dtype is None or getattr(config, "quantization_config", None) is not None:
        return
    with torch.device("meta"):
        shape = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    experts.begin(shape)


def _in_place(
    folder: Path,
    fields: Mapping[str, Any],
    tensors: CheckpointTensors,
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
            config,
            folder,
            fields,
            tensors,
            device,
            dtype,
            fp8=fp8,
            attn_implementation=attention,
        )
    except ModelError:
        raise
    except Exception as error:  # whatever a bad file makes the libraries raise
        raise ModelError(f"cannot load the weights of {folder}: {first_line(error)}") from error


def _architecture(config: Any) -> Any:
    """The class of transformers that runs a config as a causal language model."""
    found = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(found, list | tuple):
        return found
    named = [each for each in found if each.__name__ in (config.architectures or ())]
    return (named or found)[0]


def _first_attention(config: Any | None) -> str:
    """The attention a model is loaded with; the engine puts its own in place of it."""
    if config is None:
        return "sdpa"
    return "sdpa" if getattr(_architecture(config), "_supports_sdpa", False) else "eager"


def _forget_quantization(config: Any) -> None:
    """Make a config that of plain weights."""
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)


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


def _config_problem(folder: Path, fields: Mapping[str, Any], error: Exception) -> str:
    """Say in one line why `config.json` cannot be used."""
    if "auto_map" in fields:
        return (
            f"{folder} needs Python code of its own (auto_map in config.json), which hotset "
            "does not run; use a model whose architecture transformers has"
        )
    if fields["model_type"] not in transformers.CONFIG_MAPPING:
        return (
            f"{folder} is a {fields['model_type']!r} model, which transformers "
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
