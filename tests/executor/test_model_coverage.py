"""Families that crashed, were wrong or were refused for nothing, through the coverage script."""

import model_coverage
import pytest
from model_coverage import EQUAL, REFUSED, measure

EXPECTED = {
    "hunyuan_v1_moe": (EQUAL, ""),  # reads its router's weight
    "longcat_flash": (EQUAL, ""),  # likewise, and its experts are a loop of its own
    "gemma3n_text": (EQUAL, ""),  # a feed-forward size of each layer, and layers that share KV
    "qwen2_5_vl": (EQUAL, ""),  # positions in three dimensions
    "mistral3": (EQUAL, ""),
    "voxtral": (EQUAL, ""),
    "kimi_k25": (EQUAL, ""),
    "mistral4": (EQUAL, ""),  # scales queries by their position, and caches latents
    "marian": (REFUSED, "takes no position_ids"),
    "kosmos-2.5": (REFUSED, "numbers the positions"),
    "blip": (REFUSED, "it needs pixel_values"),
    "falcon_mamba": (REFUSED, "layers of type linear_attention alone"),
    "jamba": (EQUAL, ""),  # scans that get no keyword
    "qwen3_next": (EQUAL, ""),
    "nemotron_h": (EQUAL, ""),  # layers that keep nothing, and one without attention
}
FINDS_NO_PREFIX = {"jamba", "qwen3_next", "nemotron_h"}  # a state is kept each 64 tokens


@pytest.mark.filterwarnings("ignore")  # of libraries that save, and of configs shrunk
@pytest.mark.parametrize("family", EXPECTED)
def test_a_family_answers_as_generate_does_or_is_refused_for_its_reason(family: str) -> None:
    result = measure(family)

    verdict, reason = EXPECTED[family]
    assert result["verdict"] == verdict, result
    assert reason in result["message"]
    if verdict == EQUAL:
        assert result["preemptions"] > 0
        assert (result["cached_tokens"] > 0) == (family not in FINDS_NO_PREFIX)
        assert result["distinct_tokens"] > 5


def test_an_answer_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = model_coverage.reference

    def off_by_one(model: object, prompts: list[list[int]]) -> list[list[int]]:
        return [[*answer[:-1], (answer[-1] + 1) % 128] for answer in right(model, prompts)]

    monkeypatch.setattr(model_coverage, "reference", off_by_one)
    result = measure("llama")
    assert result["verdict"] == model_coverage.WRONG
    assert "alone" in result["message"]
