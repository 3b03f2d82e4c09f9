"""Two ranks on two NVIDIA GPUs of one host: run these there with `pytest -m gpu`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_models
import torch
from engines import make_prompts, reference, run
from rank_engines import check_collectives

from hotset.engine.engine import Engine
from hotset.layout import Layout
from hotset.metrics import Metrics
from hotset.ranks.driver import Ranks
from hotset.request import SamplingParams

MakeEngine = Callable[..., Engine]
RunOne = Callable[..., tuple[list[list[int]], Metrics]]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
WIDE = {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
# Heads of each rank as FlashInfer's kernels of latents have them.
WIDE_LATENTS = {**tiny_models.WIDE, "num_attention_heads": 32, "num_key_value_heads": 32}


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    """Two ranks on GPUs, in place of those on a CPU."""
    ranks = Ranks(Layout(2), "cuda", step_timeout_s=120.0)
    yield ranks
    ranks.close()


def test_sums_over_ranks_are_right_and_go_through_symmetric_memory(pair: Ranks) -> None:
    assert "symmetric memory" in pair.load(check_collectives)


@pytest.mark.parametrize(
    "family",
    ["llama", "llama-mqa", "gemma2", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe"],
)
@pytest.mark.parametrize("tiers", [{}, {"hot_blocks": 26, "host_blocks": 300}])
def test_greedy_tokens_are_those_of_transformers(
    family: str, tiers: dict[str, Any], make_ranked: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    prompts = make_prompts()
    engine = make_ranked(family, device="cuda", eager=True, max_num_batched_tokens=32, **tiers)
    engine.scheduler.ahead_tokens = 1  # so that many are preempted
    expected = reference(family, prompts, device="cuda")
    for _ in range(2):
        assert run(engine, prompts) == expected
    if tiers:
        assert engine.metrics.preemptions > 0
        assert engine.metrics.cached_tokens["host"] > 0


@pytest.mark.parametrize(
    "family", ["lfm2_moe", "qwen3_next", "qwen3_5_text", "nemotron_h", "glm_moe_dsa"]
)
def test_states_and_selections_answer_as_on_a_cpu(
    family: str, make_ranked: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    prompts = make_prompts()
    engine = make_ranked(
        family, device="cuda", eager=True, max_num_batched_tokens=24, host_blocks=100
    )
    expected = reference(family, prompts)
    for _ in range(2):
        assert run(engine, prompts) == expected


def first_logprobs(engine: Engine, *, closes: bool = False) -> list[float]:
    """Of the first token of each answer, one prompt after another; then the engine may end."""
    found = []
    for prompt in make_prompts():
        engine.add_request(prompt, SamplingParams(max_tokens=6, logprobs=1, ignore_eos=True))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        assert all(output.error is None for output in outputs)
        found.append(outputs[0].logprobs[0].logprob)
    if closes:
        engine.close()
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", WIDE),
        ("qwen3_moe", WIDE),
        ("gpt_oss", WIDE),
        ("deepseek_v3", WIDE_LATENTS),
        ("glm_moe_dsa", tiny_models.WIDE_SPARSE | WIDE_LATENTS),
        ("qwen3_5_text", {"head_dim": 128}),
        ("lfm2", {"head_dim": 128}),
        ("granitemoehybrid", {"head_dim": 128, "mamba_n_groups": 1}),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_recorded_steps_of_two_ranks_are_close_to_launched_ones(
    family: str, changes: dict[str, Any], make_ranked: MakeEngine
) -> None:
    options = {"device": "cuda", "model_changes": changes, "model_dtype": torch.bfloat16}
    launched = first_logprobs(make_ranked(family, eager=True, kv_bytes=2, **options), closes=True)
    engine = make_ranked(family, kv_bytes=2, block_size=16, **options)
    while engine.is_warming:
        engine.warm_up()
    recorded = first_logprobs(engine)
    assert first_logprobs(engine) == pytest.approx(recorded, abs=0.1)  # prefixes are found
    assert recorded == pytest.approx(launched, abs=0.1)


@pytest.mark.parametrize("changes", [{}, {"expert_plan": "stream"}, {"expert_cold_dtype": "fp8"}])
def test_experts_in_host_memory_answer_as_resident_ones(
    changes: dict[str, Any], make_ranked: MakeEngine
) -> None:
    wide = {**WIDE, "moe_intermediate_size": 256, "hidden_size": 256}
    options = {"device": "cuda", "model_changes": wide, "model_dtype": torch.bfloat16}
    resident = first_logprobs(make_ranked("qwen3_moe", kv_bytes=2, **options), closes=True)
    engine = make_ranked("qwen3_moe", kv_bytes=2, expert_slots=4, **changes, **options)
    while engine.is_warming:
        engine.warm_up()
    assert first_logprobs(engine) == pytest.approx(resident, abs=0.2 if changes else 0.05)
    engine.take_counts()
    counts = engine.metrics
    assert counts.expert_bytes > 0
    run(engine, make_prompts())
    engine.take_counts()  # the other rank's are compared with these
    assert engine.executor._ranks.failure is None
