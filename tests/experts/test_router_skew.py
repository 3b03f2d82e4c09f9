"""Routers of random weights use experts as unevenly as asked, by what hotset itself records."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_models import make_config, make_model

from hotset.bench.presets import PRESETS
from hotset.cli import cli
from hotset.cost.routing import skew_of, skewed_shares
from hotset.errors import ConfigError
from hotset.experts.router_skew import skew_routers
from hotset.experts.weights import experts_layers
from hotset.model.dummy import load_dummy


@pytest.mark.parametrize("skew", [0.0, 0.45])
def test_recorded_routing_is_as_uneven_as_claimed(skew: float, tmp_path: Path) -> None:
    """Through the commands that a user has: record a run, and let the planner read it."""
    torch.set_num_threads(1)
    out = tmp_path / "routing.npz"
    words = ["bench", "--preset", "D-small", "--first-tokens", "256", "--output-tokens", "8"]
    words += ["--router-skew", str(skew), "--record-routing", str(out), "--json"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    planned = CliRunner().invoke(cli, ["plan", "--routing", str(out), "--devices", "4", "--json"])
    found = json.loads(planned.stdout)["skew"]
    expected = skew_of([skewed_shares(128, 8, skew)])
    # Rows of random routers differ in length by chance, too: by 1 / sqrt(2 * 256).
    assert found["max_over_mean"] == pytest.approx(expected.max_over_mean, abs=0.6)
    assert found["top_quarter"] == pytest.approx(expected.top_quarter, abs=0.06)
    assert found["for_90_percent"] == pytest.approx(expected.for_90_percent, abs=0.06)
    shown = CliRunner().invoke(cli, ["plan", "--routing", str(out), "--devices", "4"])
    assert f"gets {found['max_over_mean']:.2f} times the mean" in shown.stdout


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_rows_of_the_router_are_scaled_and_nothing_else_but_embeddings(family: str) -> None:
    plain, skewed = make_model(family), make_model(family)
    skew_routers(skewed, 0.5, seed=3)
    changed = [
        name
        for (name, one), (_, other) in zip(
            plain.named_parameters(), skewed.named_parameters(), strict=True
        )
        if not torch.equal(one, other)
    ]
    layers = experts_layers(skewed)
    assert len(changed) == len(layers) + 1 and changed[0] == "model.embed_tokens.weight"
    before, after = dict(plain.named_parameters()), dict(skewed.named_parameters())
    orders = []
    for name in changed[1:]:
        ratio = after[name] / before[name]  # [E, H]
        assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4)
        orders.append(tuple(ratio[:, 0].argsort().tolist()))
    assert len(set(orders)) > 1  # not the same experts in each layer


def test_equal_seeds_make_equal_routers_on_either_side_of_the_link(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config("qwen3_moe").to_dict()))

    def load(skew: float | None, *, on_host: bool = False) -> tuple[str, list[torch.Tensor]]:
        loaded = load_dummy(
            str(tmp_path), device="cpu", dtype="auto", router_skew=skew, experts_on_host=on_host
        )
        return loaded.fingerprint, list(loaded.model.parameters())

    (one, weights), (two, others) = load(0.4), load(0.4, on_host=True)
    assert one == two
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert len({one, load(0.5)[0], load(0.0)[0], load(None)[0]}) == 4


def test_what_cannot_be_skewed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"router_skew is 0.4, but LlamaForCausalLM has no exp"):
        skew_routers(make_model("llama"), 0.4, seed=0)
    with pytest.raises(ConfigError, match="one matrix for embeddings and output"):
        skew_routers(make_model("olmoe", tie_word_embeddings=True), 0.4, seed=0)
    words = ["bench", "unshared", "--router-skew", "0.4", "--arms", "hot"]
    shown = CliRunner().invoke(cli, words)
    assert isinstance(shown.exception, ConfigError)
    assert "weights are not random" in str(shown.exception)


def test_the_small_preset_is_small() -> None:
    preset = PRESETS["D-small"]
    assert preset.model is not None
    loaded = load_dummy(preset.model, device="cpu", dtype="float32")
    assert loaded.name == "qwen3-moe-small"
    assert sum(weight.nbytes for weight in loaded.model.parameters()) < 2e8
