"""The three best layouts of some GPUs, and why the first is best."""

import json

import pytest
from click.testing import CliRunner

from hotset.cli.plan import command
from hotset.cost.catalog import load_model
from hotset.cost.hardware import load_hardware
from hotset.errors import PlanError
from hotset.layout import parse_layout
from hotset.plan.layouts import why_best
from hotset.plan.planner import make_plan, rank_layouts
from hotset.plan.workload import Request, Workload

EXPERTS = ["qwen3-30b-a3b", "--hardware", "h200", "--users", "16", "--max-model-len", "1k"]
STARVED = [*EXPERTS, "--gpus", "2", "--total-gib", "20"]


def run(*words: str) -> str:
    return CliRunner().invoke(command, list(words), catch_exceptions=False).output


def test_gpus_alone_show_the_three_best_layouts_and_then_the_best_one() -> None:
    shown = run(*STARVED).splitlines()
    assert shown[0] == "Layouts of 2 x h200, best first"
    layouts = [line.split()[0] for line in shown[2:5]]
    rates = [int(line.split()[1].replace(",", "")) for line in shown[2:5]]
    assert layouts[0] == "tp=2" and rates == sorted(rates, reverse=True)
    assert shown[5].startswith("Why: tp=2 takes ") and "experts over the host link" in shown[5]
    assert "2 x h200, tp=2, 16 users" in shown[7]


def test_json_has_the_layouts_beside_the_best_plan() -> None:
    data = json.loads(run(*STARVED, "--json"))
    assert data["layout"] == data["layouts"][0]["layout"] == "tp=2"
    assert len(data["layouts"]) == 3 and data["why"].startswith("tp=2 takes ")
    first, second, _ = data["layouts"]
    assert first["tokens_per_s"] == data["tokens_per_s"] >= second["tokens_per_s"]
    assert first["hbm_bytes_per_gpu"] <= 20 * 2**30


def test_a_layout_that_is_given_is_planned_alone() -> None:
    for words in (["--layout", "dp=2,es=2"], ["--gpus", "1"]):
        assert "best first" not in run(*EXPERTS, *words)
        assert "layouts" not in json.loads(run(*EXPERTS, *words, "--json"))


def plans_of(model: str, gpus: int, **load: int) -> list[str]:
    request = Request(load_model(model), load_hardware("h200"), Workload(**load), gpus=gpus)
    return [why_best(rank_layouts(request))]


def test_the_line_says_what_the_first_has_before_the_next() -> None:
    [held] = plans_of("llama-3-70b", 2, users=64, context=4096)
    assert held == "tp=2 is the only layout of 2 GPUs that holds the model"
    [faster] = plans_of("qwen3-30b-a3b", 8, users=256, context=2048)
    assert faster.startswith("dp=8,es=8 and dp=8,ep=8 are equally fast; dp=8,es=8 takes ")
    [more] = plans_of("deepseek-v3", 8, users=4096, context=8192)
    assert "users at once, " in more


def test_gpus_that_hold_no_layout_say_why_the_last_does_not() -> None:
    request = Request(
        load_model("llama-3.1-405b"), load_hardware("rtx-4090"), Workload(users=1), gpus=2
    )
    with pytest.raises(PlanError, match="do not fit"):
        rank_layouts(request)


def test_gpus_without_nvlink_are_told_what_a_step_exchanges() -> None:
    def notes(name: str) -> str:
        request = Request(
            load_model("qwen3-8b"), load_hardware(name), Workload(users=8), parse_layout("tp=2")
        )
        return "; ".join(make_plan(request).notes)

    assert "GPUs of l40s have no NVLink: what they exchange takes " in notes("l40s")
    assert "NVLink" not in notes("h200")
