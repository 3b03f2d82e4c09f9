"""GGUF files: a config from their metadata, and every key and tensor of them accounted for.

transformers makes the config, and reads the tensors that it has names for. It passes over other
keys and tensors in silence (widths of heads and experts, scaled rotations). These are read here,
or the file is refused by the key's name.
Source: the keys and what they mean: llama.cpp's `gguf-py/gguf/constants.py` and `src/models`.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils as transformers_gguf
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

from hotset.errors import ModelError

ROPE_FACTORS = "rope_freqs.weight"  # what each frequency is divided by (Llama 3.1)

# No answer depends on them.
_HARMLESS = {
    "tensor_data_layout",
    "vocab_size",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}
# Fields of a config by the last part of a key, where transformers passes over the key.
_FIELDS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values that change nothing
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
}
_EXPERTS = re.compile(r"(blk\.\d+\.ffn_(gate|up|down)_exps)\.weight$")
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


class _Reader(gguf.GGUFReader):  # type: ignore[misc]  # gguf has no types
    """Reads headers through a plain array: each slice of numpy's map of a file takes 3 us more."""

    data: Any

    def _get(self, *args: Any, **options: Any) -> Any:
        self.data = self.data.view(np.ndarray)
        return super()._get(*args, **options)


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Within it, a file's header is read once, and the names of its tensors are made once.

    transformers reads the header for the config, the tokenizer and the weights, 1 s each for a
    vocabulary of 49,152 tokens. It asks for the names anew for each module of a model, which took 7
    of 7.5 s of CPU for a tiny Llama of 32 layers.
    """
    reader, make = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(_Reader), functools.cache(make)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, make


class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: of the file.
        architecture: as llama.cpp calls it.

    Raises:
        ModelError: it is damaged, a part of a model, or no language model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
        try:
            self._reader = gguf.GGUFReader(str(path))
        except Exception as error:  # whatever a damaged file makes the library raise
            raise ModelError(
                f"cannot load the weights of {path}: it is damaged, cut short or of a GGUF version "
                "that is not known"
            ) from error
        self.architecture = str(self._value("general.architecture"))
        kind = self._value("general.type") or "model"
        if kind != "model":
            raise ModelError(
                f"{path} holds a GGUF of type {kind!r}, not a language model: give the model's file"
            )
        if (count := self._value("split.count") or 0) > 1:
            raise ModelError(
                f"{path} is one of the {count} files of a model: merge them "
                "(llama-gguf-split --merge), and give the file that makes"
            )

    def config(self) -> Any:
        """The transformers config of the model.

        Raises:
            ModelError: transformers has no such architecture in GGUF, or a key says something that
                is not known to be read right; names the key.
        """
        try:
            config = transformers.AutoConfig.from_pretrained(
                self.path.parent, gguf_file=self.path.name
            )
        except Exception as error:  # whatever a header makes the library raise
            raise ModelError(
                f"{self.path} holds a model of the architecture {self.architecture!r}, of which "
                f"transformers {transformers.__version__} reads no GGUF files; take the model's "
                "safetensors"
            ) from error
        if not self.is_known_to_transformers:
            self._check_tensors(config)
            self._complete(config)
        return config

    def _check_tensors(self, config: Any) -> None:
        """Refuse tensors that transformers would leave out, by the first one's name."""
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
        except Exception as error:  # whatever sizes that do not fit make the library raise
            raise self._refusal("its sizes make no model of its architecture") from error
        names = self.names(model)
        left = [
            tensor.name
            for tensor in self._reader.tensors
            if tensor.name not in names
            and tensor.name != ROPE_FACTORS
            and not ((match := _EXPERTS.match(tensor.name)) and match[1] in names)
        ]
        if left:
            raise self._refusal(
                f"{len(left)} of its tensors have no place in the model, first {left[0]}"
            )

    @property
    def tensors(self) -> list[Any]:
        """The tensors of the file, as gguf reads them."""
        return list(self._reader.tensors)

    @property
    def is_known_to_transformers(self) -> bool:
        """Whether transformers accounts for each key and tensor of the architecture itself."""
        return self.architecture in GGUF_CONFIG_ARCHS

    def processor(self, config: Any) -> Any:
        """What transformers does to the values of tensors of the architecture."""
        processors = transformers_gguf.TENSOR_PROCESSORS
        kind = processors.get(self.architecture, transformers_gguf.TensorProcessor)
        return kind(config=config.to_dict())

    def names(self, model: Any) -> dict[str, str]:
        """By the name of a tensor in a file, its name in `model`.

        Raises:
            ModelError: they have none.
        """
        # Without its parts, which would be asked in turn and know no other names.
        whole = SimpleNamespace(
            config=model.config, state_dict=model.state_dict, named_children=lambda: ()
        )
        try:
            names: dict[str, str] = transformers_gguf.get_gguf_hf_weights_map(
                whole, self.processor(model.config)
            )
        except NotImplementedError as error:
            raise self._refusal("its tensors have no names in transformers") from error
        return names

    def scale_rotations(self, model: Any) -> None:
        """Divide the frequencies of a model's rotations by what the file says, if it does.

        Raises:
            ModelError: the model has no frequencies of that shape.
        """
        tensor = next((each for each in self._reader.tensors if each.name == ROPE_FACTORS), None)
        if tensor is None:
            return
        factors = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        rotations = [
            module
            for module in model.modules()
            if isinstance(getattr(module, "inv_freq", None), torch.Tensor)
        ]
        if not rotations or any(each.inv_freq.shape != factors.shape for each in rotations):
            raise self._refusal(f"{ROPE_FACTORS} does not fit the model's rotations")
        for each in rotations:
            for name in ("inv_freq", "original_inv_freq"):
                if isinstance(frequencies := getattr(each, name, None), torch.Tensor):
                    setattr(each, name, frequencies / factors.to(frequencies.device))

    def _complete(self, config: Any) -> None:
        """Put the keys that transformers passed over into `config`, or refuse them."""
        unread = self._unread()
        if (width := unread.pop("attention.key_length", None)) is not None:
            config.head_dim = width
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        if (width := unread.pop("attention.value_length", head_dim)) != head_dim:
            raise self._refusal(f"attention.value_length is {width}, the keys' is {head_dim}")
        self._set_rotation(config, unread, head_dim)
        for key, field in _FIELDS.items():
            if key in unread and hasattr(config, field):
                if field == "sliding_window" and getattr(config, "layer_types", None):
                    continue  # these were derived from it
                setattr(config, field, unread.pop(key) or None)
        if self.architecture in _LAYERS_OF_27B:
            is_27b = config.num_hidden_layers == _LAYERS_OF_27B[self.architecture]
            config.query_pre_attn_scalar = (
                config.hidden_size // config.num_attention_heads if is_27b else head_dim
            )
        neutral = {
            **_NEUTRAL,
            "attention.sliding_window": (getattr(config, "sliding_window", None),),
            "attention.sliding_window_pattern": _patterns(config),
            "expert_feed_forward_length": (getattr(config, "intermediate_size", None),),
        }
        for key, value in sorted(unread.items()):
            if key not in _HARMLESS and value not in neutral.get(key, ()):
                raise self._refusal(f"{self.architecture}.{key} is {_short(value)}")

    def _unread(self) -> dict[str, Any]:
        """The keys of the architecture that transformers passes over, without its name."""
        read = {
            key
            for architecture, fields in transformers_gguf.GGUF_CONFIG_MAPPING.items()
            for key, field in fields.items()
            if field is not None and _plain(architecture) == _plain(self.architecture)
        }
        prefix = f"{self.architecture}."
        names = [name for name in self._reader.fields if name.startswith(prefix)]
        return {
            name.removeprefix(prefix): self._value(name)
            for name in names
            if name.removeprefix(prefix) not in read
        }

    def _set_rotation(self, config: Any, unread: dict[str, Any], head_dim: int) -> None:
        rope: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
        has_kinds = "full_attention" in rope  # of layers, with a rotation each
        full = dict(rope["full_attention"]) if has_kinds else rope
        if (base := unread.pop("rope.freq_base", None)) is not None:
            full["rope_theta"] = base
        if has_kinds and (base := unread.pop("rope.freq_base_swa", None)) is not None:
            rope["sliding_attention"] = {**rope["sliding_attention"], "rope_theta": base}
        if (width := unread.pop("rope.dimension_count", head_dim)) != head_dim:
            if "partial_rotary_factor" not in full or width > head_dim:
                raise self._refusal(f"rope.dimension_count is {width}, the heads have {head_dim}")
            full["partial_rotary_factor"] = width / head_dim
        factor = unread.pop("rope.scaling.factor", 0.0) or unread.pop("rope.scale_linear", 0.0)
        kind = unread.pop("rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise self._refusal(f"rope.scaling.type is {kind!r}")
        if kind == "linear" and factor not in (0, 1):
            full |= {"rope_type": "linear", "factor": factor}
        if full:
            config.rope_parameters = {**rope, "full_attention": full} if has_kinds else full

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(
            f"{self.path} is not known to be read right, so it is not read: {reason}; take the "
            "model's safetensors"
        )

    def _value(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()


def _patterns(config: Any) -> tuple[Any, ...]:
    """How a file may say which layers of a config slide: each, or the number up to a full one."""
    slides = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]
    if False not in slides:
        return (slides,)
    period = slides.index(False) + 1
    is_even = slides == [(layer + 1) % period != 0 for layer in range(len(slides))]
    return (slides, period) if is_even else (slides,)


def _plain(architecture: str) -> str:
    """A name as transformers and llama.cpp both have it."""
    return re.sub(r"[-_]", "", architecture)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
