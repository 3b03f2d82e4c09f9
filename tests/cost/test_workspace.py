"""The workspace of a step: widths of a planned model are those of its config."""

import pytest

from hotset.cost.catalog import bundled_config, load_model
from hotset.cost.workspace import StepWidths, step_bytes


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-30b-a3b", "deepseek-v3", "mixtral-8x7b"])
def test_a_planned_model_has_the_widths_of_its_config(name: str) -> None:
    config, _ = bundled_config(name)
    top_k = config.get("num_experts_per_tok", 0)
    latent = 0
    if rank := config.get("kv_lora_rank"):
        latent = config["num_attention_heads"] * (2 * rank + config["qk_rope_head_dim"])
    read = StepWidths(
        hidden=config["hidden_size"],
        dense=config["intermediate_size"],
        expert=config.get("moe_intermediate_size", 0),
        top_k=top_k,
        latent=latent,
        vocab=config["vocab_size"],
    )
    assert StepWidths.of(load_model(name)).token_values == read.token_values


def test_a_gpu_has_recorded_steps_and_kernels_beside_what_a_step_takes() -> None:
    widths = StepWidths.of(load_model("llama-3-8b"))
    cpu, gpu, widened = (
        step_bytes(widths, 2, device=device, max_tokens=2048, max_seqs=256, widens=widens)
        for device, widens in (("cpu", False), ("cuda", False), ("cuda", True))
    )
    assert 2048 * 2 * widths.token_values < cpu < gpu - 2**30
    assert widened == gpu + 2**28
