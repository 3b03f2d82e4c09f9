"""How many tokens a step of prompts beside decodes may have."""

from transformers import PreTrainedModel

from hotset.config import EngineConfig
from hotset.cost.config_sizes import largest
from hotset.cost.tuning import TUNINGS
from hotset.experts.weights import experts_layers


def max_mixed_tokens_of(config: EngineConfig, model: PreTrainedModel, *, is_buffered: bool) -> int:
    """Most tokens of a step of prompts beside decodes, with some experts in host memory or none."""
    if config.max_mixed_tokens is not None:
        return config.max_mixed_tokens
    tuning, layers = TUNINGS[model.device.type], experts_layers(model)
    if model.device.type == "cpu":
        return tuning.mixed_tokens
    if config.rotation_s is not None:
        # First tokens are to come soon: the fewer steps the prompts take, the fewer decodes beside.
        return config.max_num_batched_tokens
    if not layers:
        return tuning.mixed_tokens
    if is_buffered:
        # A step with prompts brings nearly all missing experts over the link, which takes longer
        # than to compute any tokens: the more of them share it, the better, decodes too.
        return config.max_num_batched_tokens
    top_k = largest(model.config.get_text_config(), "num_experts_per_tok") or 1
    num_experts: int = layers[0].num_experts
    tokens = max(tuning.mixed_tokens, tuning.mixed_rows_per_expert * num_experts // top_k)
    return min(tokens, config.max_num_batched_tokens)
