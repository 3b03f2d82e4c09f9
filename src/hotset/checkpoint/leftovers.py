"""Tensors of a checkpoint that no weight of the model takes: harmless, or a sign of wrong answers.

A bias that the config has no place for, or the scales of weights that are read without them, would
change every answer. So a tensor that is not known to be harmless is refused.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Recomputed, or of parts that make no text: no answer depends on them.
_HARMLESS = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|position_ids|_extra_state)$"
    r"|(^|\.)mtp[._]"  # layers that guess tokens ahead
    r"|(^|\.)(visual|vision_tower|vision_model|vision_encoder|multi_modal_projector|mm_projector"
    r"|audio_tower|embed_vision|embed_audio|image_newline)(\.|$)"
    r"|\.self_attn\.((attn|[kv]_proj|qkv_proj)\.)?([qkv]|prob)_scale$"  # of KV: see `kv_scales`
    r"|\.self_attn\.[kv]_proj\.output_scale$"  # the same, of AutoFP8
)
_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|causal_mask)$")
_MASKED_VALUE = re.compile(r"(^|\.)(attn|attention)\.masked_bias$")
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")


def is_harmless(name: str, shape: tuple[int, ...] | None, fields: Mapping[str, Any]) -> bool:
    """Whether the answers are the same without a tensor that the model has no place for.

    Args:
        name: in the checkpoint.
        shape: None where it is not known.
        fields: of config.json.
    """
    if _HARMLESS.search(name):
        return True
    if shape is not None and _MASK.search(name):  # a bias of a linear layer has one dimension
        return len(shape) >= 2 and shape[-1] == shape[-2] and set(shape[:-2]) <= {1}
    if shape is not None and _MASKED_VALUE.search(name):
        return set(shape) <= {1}
    return _guesses_ahead(name, fields)


def leftovers(
    names: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
    fields: Mapping[str, Any],
    ignored: Iterable[str] = (),
) -> list[str]:
    """The `names` that are not known to be harmless, sorted.

    Args:
        names: of tensors that the model has no place for.
        shapes: by name, as far as they are known.
        fields: of config.json.
        ignored: patterns of the model's own.
    """
    patterns = [re.compile(pattern) for pattern in ignored]
    return sorted(
        name
        for name in names
        if not any(pattern.search(name) for pattern in patterns)
        and not is_harmless(name, shapes.get(name), fields)
    )


def leftovers_problem(names: list[str]) -> str:
    """Say in part of a line what tensors without a place mean."""
    first = names[0]
    hint = ""
    if first.endswith(".bias"):
        hint = " (the config may lack attention_bias or mlp_bias)"
    elif re.search(r"scale|zero_point|absmax", first):
        hint = " (scales of quantised weights, which the config does not name)"
    return (
        f"{'1 tensor has' if len(names) == 1 else f'{len(names)} tensors have'} no place in it, "
        f"first {first}{hint}; without them answers would be wrong"
    )


def _guesses_ahead(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether a tensor is of the layers past the last, which guess tokens ahead (DeepSeek-V3)."""
    text = fields.get("text_config")
    text = text if isinstance(text, Mapping) else fields
    num_layers, num_ahead = (
        text.get(key) for key in ("num_hidden_layers", "num_nextn_predict_layers")
    )
    if not (match := _LAYER.search(name)) or not isinstance(num_layers, int):
        return False
    return isinstance(num_ahead, int) and num_layers <= int(match[2]) < num_layers + num_ahead
