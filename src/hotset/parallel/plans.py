"""How each layer of a model is spread over ranks, in the words of transformers' plans.

The plan (`base_model_tp_plan` of a config, `tp_plan` of a model) says it by patterns of names.
Families that it says nothing of, or less than it could, have entries here, in the same words.
"""

import re
from typing import Any

from torch import nn

REPLICATED = "replicated"
# Parameters of a module itself, a number for each head.
OF_HEADS = "local_params"


def _under(parent: str, *columns: str, rows: str) -> dict[str, str]:
    return {f"{parent}.{name}": "colwise" for name in columns} | {f"{parent}.{rows}": "rowwise"}


_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION = _under("self_attn", *_QKV, rows="o_proj")
_FEED_FORWARD = _under("feed_forward", "gate_proj", "up_proj", rows="down_proj")
_LFM2 = {
    **_under("self_attn", *_QKV, rows="out_proj"),
    **_under("feed_forward", "w1", "w3", rows="w2"),
}
# By `model_type`, of one layer.
_OWN: dict[str, dict[str, str]] = {
    "gpt_oss": {
        **_ATTENTION,
        "self_attn": OF_HEADS,
        "mlp.experts": "moe_tp_experts",
        "mlp.experts.gate_up_proj": "packed_colwise",
        "mlp.experts.down_proj": "rowwise",
    },
    "granitemoe": _ATTENTION,
    "granitemoehybrid": {
        **_ATTENTION,
        "shared_mlp.input_linear": "packed_colwise",
        "shared_mlp.output_linear": "rowwise",
    },
    "qwen2_moe": _under("mlp.shared_expert", "gate_proj", "up_proj", rows="down_proj"),
    "glm4_moe_lite": _under("mlp.shared_experts", "gate_proj", "up_proj", rows="down_proj"),
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2,
    "jamba": {**_ATTENTION, **_FEED_FORWARD},
    "bamba": {**_ATTENTION, **_FEED_FORWARD},
    "falcon_h1": {**_ATTENTION, **_FEED_FORWARD},
    "nemotron_h": {
        **_under("mixer", *_QKV, rows="o_proj"),
        **_under("mixer", "up_proj", rows="down_proj"),
        **_under("mixer.shared_experts", "up_proj", rows="down_proj"),
    },
}
# Of attention over latents: what makes the latent, and what selects, is whole on each rank.
_LATENT = {
    **dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj"), "colwise"),
    "o_proj": "rowwise",
    **dict.fromkeys(
        ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "indexer"), REPLICATED
    ),
}


def pattern_of(path: str) -> str:
    """A path as plans have it: numbers of layers are stars."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def patterns(model: Any) -> dict[str, str]:
    """The plan of a model by patterns: transformers' own, and what is said here beside it."""
    decoder = model.get_decoder()
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    own = _OWN.get(model.config.get_text_config().model_type, {})
    return {
        **(model.tp_plan or {}),
        **{f"{prefix}.layers.*.{name}": style for name, style in own.items()},
    }


def styles(modules: dict[str, nn.Module], plan: dict[str, str]) -> dict[str, str]:
    """The style of each module that a plan speaks of, by its path."""
    found = {path: plan[of] for path in modules if (of := pattern_of(path)) in plan}
    for path, module in modules.items():
        if hasattr(type(module), "expand_kv"):
            children = {name for name, _ in module.named_children()}
            found |= {f"{path}.{name}": _LATENT[name] for name in children & _LATENT.keys()}
    return found
