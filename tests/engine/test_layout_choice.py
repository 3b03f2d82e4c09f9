"""GPUs alone: the cost model chooses a layout that the engine can run, and says which and why."""

from collections.abc import Callable
from typing import Any

import pytest

from hotset.cost.catalog import find_config
from hotset.cost.hardware import load_hardware
from hotset.engine import layout_choice
from hotset.engine.layout_choice import choose_layout
from hotset.errors import ConfigError
from hotset.layout import Layout
from hotset.options import Options
from hotset.ranks.torchrun import Place

READ = Callable[[Options], tuple[dict[str, Any], str]]


def bundled(options: Options) -> tuple[dict[str, Any], str]:
    return find_config(str(options.model.model))[:2]


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of a GPU that is not here."""
    for name in ("likely_hardware", "known_hardware"):
        monkeypatch.setattr(layout_choice, name, lambda device: load_hardware("h200"))
    monkeypatch.setattr(layout_choice, "available_host_bytes", lambda: 200 * 2**30)


def choose(model: str, read: READ = bundled, **given: Any) -> tuple[Options, list[str]]:
    options, text = choose_layout(Options.of(model=model, device="cpu", **given), read)
    return options, text.splitlines()


def test_gpus_alone_become_a_layout_and_the_three_best_are_told() -> None:
    options, lines = choose("llama-3-70b", gpus=2, dtype="bfloat16", max_num_seqs=64)
    assert options.layout.tp == options.layout.num_gpus == 2
    assert lines[0] == "Layouts of 2 x h200, best first"
    assert lines[2].split()[0] == "tp=2"
    assert lines[3] == (
        "takes tp=2 for 64 users of 1,280 tokens: the only layout of 2 GPUs that this engine runs "
        "here"
    )
    assert lines[4].startswith("rates: h200; of 2 GPUs at once: measured on two H200")


def test_a_faster_layout_that_is_not_run_is_named_with_the_way_to_it() -> None:
    options, lines = choose("llama-3-8b", gpus=2, dtype="bfloat16", max_num_seqs=256)
    assert options.layout.tp == 2
    assert [line.split()[0] for line in lines[2:4]] == ["dp=2", "tp=2"]
    [better] = [line for line in lines if "times the tokens/s" in line]
    assert better.startswith("dp=2 should give 1.")
    assert better.endswith("as separate engines: hotset fleet --replicas 2")


def test_lanes_are_taken_where_they_win() -> None:
    asked: dict[str, Any] = {"gpus": 8, "dtype": "bfloat16", "hot_gib": 60.0}
    options, lines = choose("qwen3-30b-a3b", **asked, max_num_seqs=4096)
    assert (options.layout.tp, options.layout.dp) == (1, 8), lines
    options, lines = choose("qwen3-30b-a3b", **asked, max_num_seqs=4)
    assert (options.layout.tp, options.layout.dp) == (8, 1), lines


def test_measured_links_are_named_or_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lines = choose("llama-3-8b", gpus=4, dtype="bfloat16")
    assert lines[-1] == (
        "rates: h200; collectives and links of 4 GPUs at once are assumed, hotset probe --gpus 4 "
        "measures them"
    )
    monkeypatch.setattr(layout_choice, "known_hardware", lambda device: None)
    _, lines = choose("llama-3-8b", gpus=2, dtype="bfloat16")
    assert lines[-1] == (
        "rates: those of h200, as this machine was not measured; hotset probe --gpus 2 does so"
    )


def test_sums_between_hosts_go_over_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(num_local: int) -> float:
        monkeypatch.setattr(layout_choice, "place", lambda: Place(0, 2, 0, num_local, "a"))
        _, lines = choose("llama-3-70b", gpus=2, dtype="bfloat16", max_num_seqs=64)
        return float(lines[2].split()[1].replace(",", ""))

    assert rate(1) < 0.9 * rate(2)


def test_memory_that_is_given_decides_what_a_layout_holds() -> None:
    experts: dict[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 16, "gpus": 2}
    _, resident = choose("qwen3-30b-a3b", **experts)
    _, starved = choose("qwen3-30b-a3b", total_gib=20.0, **experts)
    assert "experts over the host link" in starved[2]
    assert "experts over the host link" not in resident[2]
    _, [none] = choose("qwen3-30b-a3b", total_gib=3.0, **experts)
    assert (
        none.startswith("tp=2, as there is no plan: ") and "tp=2" in none.partition(" of h200")[0]
    )


def test_experts_that_ranks_share_have_lanes_where_that_is_faster() -> None:
    experts: dict[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 256, "gpus": 8}
    options, lines = choose("qwen3-30b-a3b", **experts)
    assert options.layout.spread == Layout(1, 8, es=8)
    assert lines[2].split()[0] == "dp=8,es=8"
    assert lines[5].startswith("takes dp=8,es=8 for 256 users of 1,280 tokens: dp=8,es=8 and ")
    few, _ = choose("qwen3-30b-a3b", **{**experts, "max_num_seqs": 1})
    assert few.layout.spread == Layout(8)


def test_what_the_user_asks_for_rules_layouts_out() -> None:
    experts: dict[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 256, "gpus": 8}
    options, lines = choose("qwen3-30b-a3b", disk_gib=100.0, **experts)  # dp has none
    assert options.layout.spread.dp == 1
    assert any("which this engine cannot run yet" in line for line in lines)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (
            "llama-3-8b",
            {"gpus": 3},
            "tp=3 does not divide the 32 attention heads of llama-3-8b; possible: 1, 2, 4, 8",
        ),
        ("llama-3-8b", {"gpus": 4, "tp": 2}, "gpus is 4, and tp=2 takes 2; give one of them"),
        ("llama-3-8b", {"gpus": 2, "row_prefetch": 1}, "leave gpus out"),
    ],
)
def test_gpus_that_no_layout_can_share_are_refused(
    model: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(model, dtype="bfloat16", **given)


def test_a_model_that_the_planner_does_not_know_is_cut_by_heads() -> None:
    def unknown(options: Options) -> tuple[dict[str, Any], str]:
        return {"model_type": "of_tomorrow"}, "tomorrow"

    options, [line] = choose("tomorrow", unknown, gpus=2)
    assert options.layout.tp == 2
    assert line.startswith("tp=2, as the planner does not know the model: ")


def test_a_layout_that_was_given_and_one_gpu_are_left_alone() -> None:
    def never(options: Options) -> tuple[dict[str, Any], str]:
        raise AssertionError("nothing is to be read")

    for given in ({"tp": 2}, {"tp": 2, "gpus": 2}, {"gpus": 1}, {}):
        asked = Options.of(**given)
        assert choose_layout(asked, never) == (asked, "")
