"""From a config alone: which class runs the checkpoint, and whether it can be served.

The model is made on `meta`, without memory, and inspected there, before weights are read or
downloaded. Multimodal models are served with text alone, without the parts that only images, video
and audio go through.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from hotset.errors import ModelError
from hotset.executor.probe import check_decoder, inspect_model
from hotset.libraries import first_line, quiet
from hotset.linear.reads import is_read, mark_as_read


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to make the model of a config.

    Attributes:
        config: of transformers.
        fields: what config.json holds.
        model_class: makes the model without the parts in `unused`; it has the name
            of the class in transformers.
        is_inspected: whether the model ran without memory; else only its values can tell.
        read_layers: paths of the linear layers whose weight the model reads itself, see
            `linear.reads`.
        unused: paths of the parts that text never goes through, which are not loaded.
        unused_parameters: how many numbers they hold.
    """

    config: Any
    fields: Mapping[str, Any]
    model_class: type[PreTrainedModel]
    is_inspected: bool = False
    read_layers: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    unused_parameters: int = 0

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the weights, by the config or its text part; None where neither says it."""
        dtype: torch.dtype | None = self.config.dtype or self.config.get_text_config().dtype
        return dtype

    @property
    def attention(self) -> str:
        """The attention to load it with; the engine puts its own in place of it."""
        return "sdpa" if getattr(self.model_class, "_supports_sdpa", False) else "eager"

    def make(self, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        """The model with weights as for training, where torch puts new tensors."""
        config = copy.deepcopy(self.config)  # models write into theirs
        model: PreTrainedModel = self.model_class._from_config(config, dtype=dtype, **options)
        self.mark_read_layers(model)
        return model

    def mark_read_layers(self, model: nn.Module) -> None:
        """Mark the layers of `model` that are not to be replaced; see `linear.reads`."""
        for path in self.read_layers:
            mark_as_read(model.get_submodule(path))

    def outline(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model on `meta`, in eval mode."""
        with quiet(), torch.device("meta"):
            return self.make(dtype).eval()

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user: the parts of the checkpoint that are not served."""
        if not self.is_multimodal:
            return ()
        line = "text part of a multimodal model: images, audio and video are refused"
        if self.unused:
            millions = self.unused_parameters / 1e6
            line += f"; not loaded: {', '.join(self.unused)} ({millions:,.0f} million parameters)"
        return (line,)

    @property
    def is_multimodal(self) -> bool:
        """Whether the checkpoint can see or hear, beside answering text."""
        names = ("vision_config", "audio_config", "image_token_id", "image_token_index")
        return bool(self.unused) or any(getattr(self.config, name, None) for name in names)


def transformers_config(folder: Path, fields: Mapping[str, Any]) -> Any:
    """The transformers config of a folder whose config.json has these `fields`.

    Raises:
        ModelError: transformers does not know it; says why.
    """
    try:
        with quiet():
            known = known_fields(fields, str(folder))
            if known is not fields:
                return transformers.AutoConfig.for_model(**known)
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_config_problem(folder, fields, error)) from error


# Settings that transformers has no field for, at the values of DeepSeek-V3's own code.
_DEEPSEEK_V3_SETTINGS = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
_WITHOUT_EFFECT = {"aux_loss_alpha", "seq_aux", "ep_size", "auto_map", "quantization_config"}


def known_fields(fields: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The fields of a config under a model type that transformers knows.

    Kimi K2 is DeepSeek-V3 under a name that transformers lacks; other fields are returned as they
    are.

    Raises:
        ModelError: it is of Kimi K2, but has a setting that DeepSeek-V3 of transformers has not.
    """
    if fields.get("model_type") != "kimi_k2" or "kimi_k2" in transformers.CONFIG_MAPPING:
        return fields
    for name, expected in _DEEPSEEK_V3_SETTINGS.items():
        if fields.get(name) != expected:
            raise ModelError(
                f"{source} is a 'kimi_k2' model, which is run as DeepSeek-V3, but its {name} is "
                f"{fields.get(name)!r}; expected {expected!r}"
            )
    config = transformers.DeepseekV3Config()
    known = {*config.to_dict(), "rope_theta", "rope_scaling", "torch_dtype", "model_type"}
    known |= _DEEPSEEK_V3_SETTINGS.keys() | _WITHOUT_EFFECT
    if unknown := sorted(name for name in fields if name not in known and name[:1] != "_"):
        raise ModelError(
            f"{source} is a 'kimi_k2' model, which is run as DeepSeek-V3, but that has no setting "
            f"{unknown[0]!r}"
        )
    plain = {name: value for name, value in fields.items() if name != "auto_map"}
    return plain | {"model_type": "deepseek_v3"}


def find_architecture(config: Any, source: str, fields: Mapping[str, Any]) -> Architecture:
    """The class that runs a config, after its model was made without memory and inspected.

    Args:
        config: as `transformers_config` gives it.
        source: what messages call it.
        fields: what config.json holds.

    Raises:
        ModelError: hotset cannot run it, whatever the weights are; says why.
    """
    check_decoder(
        config, (config.architectures or [f"{source}, a {config.model_type!r} model,"])[0]
    )
    model_class = _class_of(config, source)
    text_config = config.get_text_config()
    if model_class.config_class is type(text_config):  # a class of the text part alone
        config = text_config
    whole = Architecture(config, fields, model_class)
    called: set[str] = set()
    try:
        outline = whole.outline(torch.float32)
    except Exception as error:  # whatever a config that does not fit makes the libraries raise
        raise ModelError(f"cannot make a model of {source}: {first_line(error)}") from error
    hooks = [
        module.register_forward_pre_hook(_note(called, path))
        for path, module in outline.named_modules()
    ]
    if not _inspect(outline):
        return whole
    for hook in hooks:
        hook.remove()
    read_layers = tuple(path for path, module in outline.named_modules() if is_read(module))
    whole = replace(whole, is_inspected=True, read_layers=read_layers)
    unused = _unused_parts(outline, called)
    if not unused:
        return whole
    numbers = sum(p.numel() for path in unused for p in outline.get_submodule(path).parameters())
    part = replace(
        whole, model_class=_without(model_class, unused), unused=unused, unused_parameters=numbers
    )
    _inspect(part.outline(torch.float32))
    return part


def _class_of(config: Any, source: str) -> type[PreTrainedModel]:
    for mapping in (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    ):
        if type(config) not in mapping:
            continue
        found = mapping[type(config)]
        classes = list(found) if isinstance(found, list | tuple) else [found]
        named = [c for c in classes if c.__name__ in (config.architectures or ())]
        chosen: type[PreTrainedModel] = (named or classes)[0]
        if not issubclass(chosen, GenerationMixin):
            raise ModelError(
                f"{chosen.__name__} does not answer one token after another, as models that "
                "diffuse text or act do not: not supported"
            )
        return chosen
    raise ModelError(
        f"{source} is a {config.model_type!r} model, which transformers "
        f"{transformers.__version__} cannot run as a model that answers text"
    )


def _inspect(outline: PreTrainedModel) -> bool:
    """Inspect a model on `meta`; False where only its values could tell. Raises ModelError."""
    try:
        inspect_model(outline)
    except ModelError as error:
        if error.__cause__ is not None and "meta" in str(error.__cause__):
            return False
        raise
    return True


def _note(called: set[str], path: str) -> Any:
    def note(*_: Any) -> None:
        called.add(path)

    return note


def _unused_parts(model: PreTrainedModel, called: set[str]) -> tuple[str, ...]:
    """The largest modules with weights beside the decoder in which nothing was called."""
    decoder = model.get_decoder()
    inner = {id(module) for module in decoder.modules()}
    unused: list[str] = []

    def visit(module: nn.Module, path: str) -> None:
        if id(module) in inner:
            return
        paths = [f"{path}.{below}" if below else path for below, _ in module.named_modules()]
        holds_decoder = any(part is decoder for part in module.modules())
        if not holds_decoder and not called.intersection(paths):
            if any(True for _ in module.parameters()):
                unused.append(path)
            return
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name)

    if decoder is not model:
        visit(model, "")
    return tuple(unused)


def _without(model_class: type[PreTrainedModel], unused: tuple[str, ...]) -> type[PreTrainedModel]:
    """The same class, but models lose the modules at the paths `unused` once they are made.

    That is before weights are loaded, so that these are not read either.
    """

    def init(self: PreTrainedModel, config: Any, *args: Any, **options: Any) -> None:
        model_class.__init__(self, config, *args, **options)
        for path in unused:
            parent, _, name = path.rpartition(".")
            setattr(self.get_submodule(parent), name, None)
        prefixes = tuple(f"{path}." for path in unused)
        tied = getattr(self, "all_tied_weights_keys", None)
        if isinstance(tied, dict):
            self.all_tied_weights_keys = {
                key: of for key, of in tied.items() if not key.startswith(prefixes)
            }

    # With and without the base model's name, as checkpoints have both.
    base = f"{model_class.base_model_prefix}."
    ignored = {rf"(^|\.){re.escape(path.removeprefix(base))}\." for path in unused}
    ignored.update(model_class._keys_to_ignore_on_load_unexpected or ())
    namespace = {
        "__init__": init,
        "__module__": model_class.__module__,  # else transformers takes it for code of a checkpoint
        "__qualname__": model_class.__qualname__,
        "_keys_to_ignore_on_load_unexpected": ignored,
    }
    return type(model_class.__name__, (model_class,), namespace)


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
