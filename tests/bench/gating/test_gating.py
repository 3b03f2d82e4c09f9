"""Static gating is what GShard does, and the comparison says what ended each of its sweeps."""

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from hotset.bench.gating.static import (
    Shape,
    capacity_of,
    dispatch_mask,
    dropped_share,
    make_layer,
    route,
    static_experts,
)
from hotset.bench.gating.sweep import Limits, Way, sweep
from hotset.cli.bench_moe_gating import command
from hotset.errors import ConfigError
from hotset.experts.gating import dynamic_experts

SMALL = ["--experts", "8", "--hidden", "64", "--ffn", "24", "--device", "cpu", "--repeats", "2"]


@torch.inference_mode()
def test_static_gating_with_room_for_all_gives_what_dynamic_gating_gives() -> None:
    shape = Shape(num_experts=8, hidden=16, ffn=24, top_k=2)
    layer = make_layer(shape, device="cpu", dtype=torch.float32)
    x = torch.randn(20, 16)
    ids, weights = route(x, torch.randn(8, 16), 2)
    assert dropped_share(ids, 8, 1.0) == 0
    dynamic = dynamic_experts(layer, x, ids, weights)
    torch.testing.assert_close(static_experts(layer, x, ids, weights, factor=1.0), dynamic)
    assert dynamic.abs().max() > 0.1


@torch.inference_mode()
def test_static_gating_drops_what_is_beyond_the_capacity_the_last_and_second_choices_first() -> (
    None
):
    ids = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])
    capacity = capacity_of(0.5, 4)
    assert capacity == 2
    mask = dispatch_mask(ids, 3, capacity)
    kept = mask.any(-1)  # [k, S, E]
    # Expert 0: tokens 0 and 1; token 2 and token 3's second choice find it full. Expert 1: the
    # first choice of token 3, then token 0; token 1 finds it full.
    assert kept[0].nonzero().tolist() == [[0, 0], [1, 0], [3, 1]]
    assert kept[1].nonzero().tolist() == [[0, 1], [2, 2]]
    assert mask.sum((0, 1)).max() == 1  # no row of an expert has two tokens
    assert dropped_share(ids, 3, 0.5) == 3 / 8


def test_the_comparison_covers_every_way_and_says_why_each_stopped(tmp_path: Path) -> None:
    out = tmp_path / "gating.json"
    words = [*SMALL, "--memory-gib", "0.0012", "--max-tokens", "128", "--sequence", "32"]
    words += ["--layers", "2", "--decode-tokens", "4", "--max-s", "60", "--out", str(out)]
    shown = CliRunner().invoke(command, words, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    result = json.loads(out.read_text())
    for part in ("layer", "model"):
        ways = {way["way"]: way for way in result[part]["ways"]}
        gathering = ["batched_mm"] if part == "layer" else []
        static = ["static f=0.05", "static f=0.25", "static f=1"]
        assert list(ways) == ["dynamic", "grouped_mm", *gathering, *static]
        assert ways["dynamic"]["largest_tokens"] == 128
        assert ways["static f=1"]["largest_tokens"] < 128
        why = ways["static f=1"]["stopped_by"]
        assert "need" in why or "took" in why
        assert ways["static f=0.25"]["waste_ef_over_k"] == 1.0
        for way in ways.values():
            assert all(0 < point["peak_bytes"] <= 0.0012 * 2**30 for point in way["points"])
    assert len(result["decode"]["ways"]) == 3
    text = out.with_suffix(".md").read_text()
    assert text.count("| static") == 6
    assert "smaller than on a GPU" in text  # defaults on a CPU are not the paper's


def test_a_way_that_runs_out_of_device_memory_ends_there_and_the_others_go_on() -> None:
    def greedy(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return x + 1

    ways = [Way("lean", lambda x: x + 1), Way("greedy", greedy, capacity=1.0)]
    lean, ended = sweep(ways, lambda tokens: (torch.ones(tokens),), Limits([1, 2, 4, 8]))
    assert [point.tokens for point in lean.points] == [1, 2, 4, 8]
    assert [point.tokens for point in ended.points] == [1, 2]
    assert ended.stopped_by == "4 do not fit into the device"
    assert lean.stopped_by == "largest batch tried"


def test_nothing_is_begun_that_would_end_after_the_time_given() -> None:
    past = Limits([1, 2], deadline_s=time.monotonic() - 1)
    [only] = sweep([Way("any", lambda x: x)], lambda tokens: (torch.ones(tokens),), past)
    assert only.best is None
    assert only.stopped_by == "no time left for a larger batch"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--capacity", "0"], "capacity factor of 0 "),
        (["--capacity", "x"], "--capacity is 'x'"),
        (["--batches", "1.5"], "whole numbers"),
        (["--batches", "200", "--layers", "2"], "not whole sequences of 128"),
        (["--layers", "1"], "no MoE layer"),
        (["--max-s", "0"], "above 0"),
        (["--out", "/nosuch/x.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], message: str) -> None:
    shown = CliRunner().invoke(command, [*SMALL, *words])
    assert isinstance(shown.exception, ConfigError)
    assert message in str(shown.exception)


def test_sizes_and_factors_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="top-3 of 2 experts"):
        Shape(num_experts=2, hidden=8, ffn=8, top_k=3)
    with pytest.raises(ConfigError, match="1 or more"):
        Shape(num_experts=2, hidden=0, ffn=8, top_k=1)
    with pytest.raises(ConfigError, match="capacity factor of 0 "):
        capacity_of(0, 8)
