"""The hot set of a plan: its lines, what bounds it, and what is refused."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import hotset.bench
from hotset.cli.plan import command
from hotset.cli.serve import command as serve_command
from hotset.errors import PlanError
from hotset.plan.selection_file import save_selections

SHAPE = str(Path(hotset.bench.__file__).parent / "shapes" / "dsa-8l.json")
CASE = [
    SHAPE,
    *("--hardware", "h200", "--gpus", "1", "--hot-gib", "6", "--expert-slots", "64"),
    *("--host-gib", "64", "--max-model-len", "34k", "--output-tokens", "2k"),
    *("--index-dtype", "fp8"),
]
GLM = ["glm-5.1", "--dtype", "fp8", "--hardware", "h200", "--layout", "dp=8,ep=8"]
GLM += ["--max-model-len", "40k", "--output-tokens", "8k", "--index-dtype", "fp8"]
GLM += ["--engine", "published"]  # SGLang ran it


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


def planned(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["hot_set"]
    assert isinstance(found, dict)
    return found


def test_eight_layers_in_six_gib_give_about_three_times_the_tokens() -> None:
    found = planned(*CASE)
    assert (found["users_resident"], found["break_even_users"]) == (18, 20)
    assert found["limit"] == "HBM"
    assert 2.7 < found["gain"] < 2.85  # rows come at 41 GB/s, not 50
    assert found["link_bytes_per_s"] == pytest.approx(36e6 * 1152)
    assert found["host_bytes"] == pytest.approx(found["users_hot"] * 33_792 * 10_272)
    text = run(*CASE).output
    assert f"{found['slots']:,} of 33,792 tokens per hot user and layer on the device" in text
    assert "18 resident, or" in text and "overlap 0.40 (assumed;" in text


def test_the_quoted_case_of_eight_gpus_with_prompts_computed_on_them() -> None:
    found = planned(*GLM)
    assert found["users_resident"] == 16  # two per GPU, as SGLang ran it
    assert found["resident_tokens_per_s"] == pytest.approx(560, rel=0.1)
    assert 2.1 < found["gain"] < 2.4  # 2.6 to 3 with prompts elsewhere, as the example says


def test_latency_bounds_how_many_turn_hot() -> None:
    free, bound = planned(*GLM), planned(*GLM, "--tpot-ms", "40")
    assert bound["step_s"] <= 0.040 < free["step_s"]
    assert bound["users"] < free["users"] and bound["limit"] == "TPOT"


def test_prefetch_and_overlap_raise_the_gain() -> None:
    gains = [
        planned(*CASE, "--selection-overlap", overlap, "--row-prefetch", prefetch)["gain"]
        for overlap, prefetch in (("0.35", "0"), ("0.5", "0"), ("0.5", "2"))
    ]
    assert gains == sorted(gains)


def test_a_plan_says_what_comes_ahead() -> None:
    found = planned(*CASE, "--row-prefetch", "2")
    assert 0 < found["guessed_right"] < found["guessed"]
    text = run(*CASE, "--row-prefetch", "2").output
    assert f"{found['guessed']:,.0f} more, guessed, {found['guessed_right']:,.0f} of them" in text
    assert "ahead" not in run(*CASE).output
    worse = planned(*CASE, "--row-prefetch", "2", "--selection-guessed", "0.5")
    assert worse["gain"] < found["gain"]


def test_recorded_selections_replace_the_overlap(tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    positions = np.tile(np.arange(2048, dtype=np.int32), (8, 1, 1))
    positions[1::2] += 1024
    save_selections(path, [positions], {})
    found = planned(*CASE, "--selection", str(path))
    assert found["overlap"] == 0.5 and found["overlap_by_layer"] == [0.5]
    assert found["slots"] == 3072 and found["misses"] == 0
    text = run(*CASE, "--selection", str(path)).output
    assert "overlap 0.50 (recorded; 0.40 is assumed without a file)" in text
    assert "by layer     0.50\n" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([*CASE, "--users", "18"], "none turns hot: 18 users are resident"),
        (
            [*CASE, "--max-model-len", "5k", "--output-tokens", "1k", "--users", "5000"],
            "of them hot, would get 0.9",
        ),
        ([*CASE, "--tpot-ms", "1"], "none turns hot: none fits within 1 ms"),
        (
            [*CASE, "--max-model-len", "2k", "--output-tokens", "1k", "--users", "5000"],
            "none turns hot: none fits, or contexts are hardly longer than the 2,048 selected",
        ),
    ],
)
def test_a_plan_says_why_none_turns_hot(arguments: list[str], line: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 0 and line in result.output and "Hot set    " in result.output


@pytest.mark.parametrize("index_dtype", ["auto", "fp8"])
def test_the_command_serves_as_many_hot_requests_as_planned(
    index_dtype: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"  # of a folder that has weights, too
    config.write_text(Path(SHAPE).read_text())
    arguments = [str(config), *CASE[1:-1], index_dtype, "--row-prefetch", "2"]
    data = json.loads(run(*arguments, "--json").stdout)
    words = shlex.split(data["serve"]["command"])
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--hot-tokens"] == str(data["hot_set"]["slots"])
    assert given["--max-num-seqs"] == str(data["hot_set"]["users"])
    assert (given["--hot-gib"], given["--host-gib"]) == ("6", "64")
    assert given.get("--index-dtype", "auto") == index_dtype and given["--row-prefetch"] == "2"
    serve_command.make_context("serve", words[2:])  # takes it
    few = json.loads(run(*arguments, "--users", "10", "--json").stdout)
    assert "--hot-tokens" not in few["serve"]["command"]


def test_the_page_and_the_explanation_name_the_index_keys_and_the_hot_set(tmp_path: Path) -> None:
    assert run(*CASE, "--html", str(tmp_path / "one.html")).exit_code == 0
    assert "tokens per hot user and layer" in (tmp_path / "one.html").read_text("utf-8")
    text = run(*CASE, "--explain").output
    assert "index keys: 1,056 B per token over all layers" in text
    assert "scoring index keys: each of 18 x 33,792 keys once" in text


def test_a_model_without_an_indexer_says_nothing() -> None:
    result = run("llama-3-8b", "--json")
    assert json.loads(result.stdout)["hot_set"] is None
    assert "Hot set" not in run("llama-3-8b").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-3-8b", "--tpot-ms", "40"], "--tpot-ms is given, but llama-3-8b has no indexer"),
        (["llama-3-8b", "--selection-overlap", "0.4"], "--selection-overlap is given, but llama"),
        (["llama-3-8b", "--selection", "one.npy"], "--selection is given, but llama-3-8b has no"),
        (["llama-3-8b", "--index-dtype", "fp8"], "--index-dtype is given, but llama-3-8b has no"),
        (["llama-3-8b", "--row-prefetch", "1"], "--row-prefetch is given, but llama-3-8b has no"),
        ([*GLM, "--tpot-ms", "0"], "--tpot-ms is 0; expected above 0"),
        ([*GLM, "--tpot-ms", "nan"], "--tpot-ms is nan; expected a number"),
        ([*GLM, "--row-prefetch", "3"], "--row-prefetch is 3; expected 0, 1 or 2"),
        ([*GLM, "--selection-overlap", "1.5"], "overlap of selections is 1.5; expected above 0"),
        (["llama-3-8b", "--selection-guessed", "0.5"], "--selection-guessed is given, but llama"),
        ([*GLM, "--selection-guessed", "1"], "--selection-guessed is 1; expected above 0 and at"),
        ([*GLM, "--selection", "nowhere.npy"], "selection file nowhere.npy cannot be read"),
        ([*GLM, "--selection", "x", "--selection-overlap", "0.4"], "are both given"),
        ([*GLM, "--index-dtype", "int8"], "--index-dtype is 'int8'; expected auto or fp8"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    error = run(*arguments).exception
    assert isinstance(error, PlanError)
    assert message in str(error) and "\n" not in str(error)
