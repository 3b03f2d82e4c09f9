"""Read checkpoints: a folder of safetensors or a GGUF file, to a model in memory."""

import contextlib
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from hotset.checkpoint import leftovers, quantized
from hotset.checkpoint.files import check_generation_config, read_config
from hotset.checkpoint.tensors import CheckpointTensors
from hotset.cost.quantisation import with_modelopt
from hotset.errors import ModelError, TierError
from hotset.experts.disk import ExpertSink
from hotset.foreign_text import parse_json
from hotset.libraries import first_line
from hotset.model import weights
from hotset.model.architecture import Architecture, find_architecture, transformers_config
from hotset.model.cut_model import ModelCutter
from hotset.model.narrow_experts import NarrowExperts, without_experts

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")


def load_folder(
    folder: Path,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    fp8: bool = False,
    experts: ExpertSink | None = None,
    narrow: NarrowExperts | None = None,
    cutter: ModelCutter | None = None,
    in_place: torch.device | None = None,
    input_bits: Literal[16, 8] = 16,
) -> Any:
    """Load a folder's model.

    On a GPU, or for `fp8`, weights go straight to their place and sibling layers are merged, where
    the checkpoint is plain enough; see `weights.load_in_place`. On the CPU they are the pages of
    the file, which takes no memory at all.

    Args:
        folder: of the checkpoint.
        architecture: as `read_architecture` gives it.
        device: where the weights go that are not read in place.
        dtype: of the weights; None is the checkpoint's.
        fp8: store those of linear layers in 8 bits. A checkpoint that is not plain is loaded in
            `dtype`, for the caller to round.
        experts: where those go that host memory has no room for.
        narrow: the experts whose own bytes are kept; None where all weights are plain.
        cutter: leaves layers that are read in place with this rank's part; None cuts nothing.
        in_place: where weights go that are read in place; on the CPU only weights of `fp8` are.
            None is `device`.
        input_bits: see `CheckpointTensors`.

    Raises:
        ModelError: it cannot be loaded; says why.
    """
    dtype, in_place = dtype or architecture.dtype, in_place or device
    tensors = (
        CheckpointTensors(folder, architecture.fields, input_bits=input_bits)
        if narrow is None
        else narrow.tensors
    )
    if tensors.is_dequantised:
        _forget_quantization(architecture.config)
    if narrow is not None:
        return _with_narrow(narrow, architecture, device, dtype or torch.bfloat16, experts)
    model = None
    if dtype is not None and (fp8 or in_place.type == "cuda"):
        with _in_one_line(folder, tensors.shapes):
            model = weights.load_in_place(
                architecture, tensors, in_place, dtype, fp8=fp8, cutter=cutter
            )
    if model is None:
        if experts is not None:
            _begin(experts, architecture, dtype)
        with experts.catch_loaded() if experts is not None else contextlib.nullcontext():
            model = _with_transformers(tensors, architecture, device, dtype)
        if experts is not None:
            experts.finish(model)
    return model


def _with_narrow(
    narrow: NarrowExperts,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    experts: ExpertSink | None,
) -> Any:
    """A model whose experts go where they stay as they are stored."""
    if experts is not None:
        outline = architecture.outline(dtype)
        narrow.mark(outline)
        experts.begin(outline)
    architecture = without_experts(architecture)
    model = _with_transformers(narrow.tensors, architecture, device, dtype, without=narrow.names)
    with _in_one_line(narrow.tensors.folder, narrow.tensors.shapes):
        narrow.load(model, experts)
    if experts is not None:
        experts.finish(model)
    return model


def load_tokenizer(folder: Path) -> Any | None:
    """A folder's tokenizer; None where it has none. Raises ModelError."""
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        return None
    tokenizer = _load_tokenizer(folder, folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _processor_template(folder)
    return tokenizer


def read_architecture(folder: Path) -> Architecture:
    """The class that runs a folder, by its config.json; reads no weight.

    Raises:
        ModelError: what the config alone tells cannot be read or run; says why.
    """
    fields = with_modelopt(folder, read_config(folder))
    check_generation_config(folder)
    quantized.check_config(folder, fields)
    config = transformers_config(folder, fields)
    return find_architecture(config, str(folder), fields)


def load_gguf(
    file: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    why_wide: str | None = "",
    allow_widening: bool = True,
    on_gpu: bool = False,
) -> tuple[Any, Any, Architecture, str | None]:
    """Load a GGUF file's model and its tokenizer.

    Args:
        file: of the model.
        device: where the weights go.
        dtype: of what is not narrow; None is the file's.
        why_wide: why all matrices are dequantised; None keeps them as in the file, where a CPU can.
        allow_widening: of matrices in few bits, for that reason.
        on_gpu: whether `device` is a GPU, or weights go on to one.

    Returns:
        The model, its tokenizer, its architecture, and a line on how its weights are kept; None
        where the file has none in few bits.

    Raises:
        ModelError: it cannot be loaded, or would be widened, which is not allowed; says why.
    """
    # Here, as they need parts of transformers that others do without.
    from hotset.checkpoint.gguf_file import GgufFile, read_once
    from hotset.model import gpu_gguf, narrow_gguf

    with read_once():
        header = GgufFile(file)
        config = header.config()
        architecture = find_architecture(config, str(file), config.to_dict())
        narrow_dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
        if why_wide is None and on_gpu:
            why_wide = gpu_gguf.why_not_narrow(header, architecture, device, narrow_dtype)
        if why_wide is not None and not allow_widening:
            narrow_gguf.check_plain(header, why_wide)
        if why_wide is None and not on_gpu:
            why_wide = narrow_gguf.why_not_narrow(header, architecture)
        if why_wide is None:
            with _in_one_line(file, {}):
                if on_gpu:
                    model = gpu_gguf.load_narrow(
                        header, architecture, device, narrow_dtype, allow_widening=allow_widening
                    )
                else:
                    model = narrow_gguf.load_narrow(header, architecture, narrow_dtype)
            note: str | None = narrow_gguf.storage_note(header, model)
        else:
            # Dequantised at load: left packed, the linear layers would need kernels from the hub.
            # The redirect is for a progress bar that heeds no setting.
            with contextlib.redirect_stderr(io.StringIO()):
                model = _from_pretrained(
                    file,
                    architecture,
                    device,
                    dtype,
                    folder=file.parent,
                    gguf_file=file.name,
                    quantization_config=transformers.GgufConfig(dequantize=True),
                )
            note = narrow_gguf.widening_note(header, why_wide)
        header.scale_rotations(model)
        tokenizer = _load_tokenizer(file, file.parent, gguf_file=file.name)
    return model, tokenizer, architecture, note


def _with_transformers(
    tensors: CheckpointTensors,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    without: Collection[str] = (),
) -> Any:
    """What `from_pretrained` makes of a folder, 8-bit blocks dequantised on their way.

    Tensors of the names `without` are left out, where there are narrow ones.
    """
    folder = tensors.folder
    if not tensors.is_dequantised:
        return _from_pretrained(folder, architecture, device, dtype, tensors, folder=folder)
    # Not by transformers: it takes the block for what divides the rows evenly, and its kernels for
    # narrow weights are downloads.
    dtype = dtype or torch.bfloat16
    with tensors.open(device, dtype, without=without) as reads:
        model = _from_pretrained(
            folder, architecture, device, dtype, tensors, folder=None, state_dict=reads
        )
    weights.read_generation_config(model, folder)
    return model


def _from_pretrained(
    source: Path,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype | None,
    tensors: CheckpointTensors | None = None,
    *,
    folder: Path | None,
    **options: Any,
) -> Any:
    """Load weights straight to `device`.

    Args:
        source: what messages name.
        architecture: of the model.
        device: where weights go.
        dtype: of the weights; None is the checkpoint's.
        tensors: of a folder, which tell what may be left over of them.
        folder: with the weights; None where `options` has them.
        options: of transformers.
    """
    with _in_one_line(source, {} if tensors is None else tensors.shapes):
        model, report = architecture.model_class.from_pretrained(
            folder,
            config=architecture.config,
            attn_implementation=architecture.attention,
            dtype="auto" if dtype is None else dtype,
            device_map={"": str(device)},
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    if problem := _misfit(report, architecture.fields, tensors):
        raise ModelError(f"{source} does not fit its config: {problem}")
    return model


@contextlib.contextmanager
def _in_one_line(source: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Say what a bad file makes the libraries raise while weights are loaded."""
    try:
        yield
    except (ModelError, TierError):  # our own, the latter of experts on disk
        raise
    except Exception as error:  # whatever a bad file makes the libraries raise
        raise ModelError(
            f"cannot load the weights of {source}: {_loading_problem(error, shapes)}"
        ) from error


def _processor_template(folder: Path) -> str | None:
    """The chat template of a multimodal model's processor, where older ones keep it."""
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    try:
        fields = parse_json(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is not JSON: {first_line(error)}") from error
    template = fields.get("chat_template") if isinstance(fields, dict) else None
    return template if isinstance(template, str) else None


def _misfit(
    report: Mapping[str, Any], fields: Mapping[str, Any], tensors: CheckpointTensors | None
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
            f"tensors of other shapes: {len(wrong)}, first {name}: stored {list(found)}, expected "
            f"{list(expected)}; the config is of another model, or lacks a setting"
        )
    left = report["unexpected_keys"]
    if tensors is not None:
        left = [name for name in left if not tensors.is_zero_bias(name)]
    names = leftovers.leftovers(left, {} if tensors is None else tensors.shapes, fields)
    return leftovers.leftovers_problem(names) if names else None


def _loading_problem(error: Exception, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Say in one line why transformers could not load weights."""
    line = first_line(error)
    if "automatic conversion of the weights" not in line:
        return line
    # It points at a report that is not shown.
    end = "the checkpoint is damaged or of another architecture"
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        groups.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.*.", name), {})[name] = shape
    for group in groups.values():
        common = Counter(group.values()).most_common(1)[0][0]
        for name, shape in group.items():
            if shape != common:
                return f"{name} is {list(shape)}, of other experts {list(common)}; {end}"
    return f"tensors that belong together (of experts, say) differ in shape or number; {end}"


def _begin(experts: ExpertSink, architecture: Architecture, dtype: torch.dtype | None) -> None:
    """Show the sink the shape of what is loaded next, if it is known."""
    if dtype is not None and getattr(architecture.config, "quantization_config", None) is None:
        experts.begin(architecture.outline(dtype))


def _forget_quantization(config: Any) -> None:
    """Turn a config into one of plain weights."""
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)


def _load_tokenizer(source: Path, folder: Path, **options: Any) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **options
        )
    except Exception as error:
        raise ModelError(f"cannot load the tokenizer of {source}: {first_line(error)}") from error
