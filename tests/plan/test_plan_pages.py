"""What the planner prints: explanations, examples, the page, and the profile of a probe."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from hotset.cli.plan import command
from hotset.cost.hardware import hardware_from_json, load_hardware, probe_path
from hotset.plan import expert_links
from hotset.plan.example_moe import moe_example
from hotset.plan.example_offload import offload_example


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_explanation_fills_in_the_quoted_figures() -> None:
    text = run(
        "llama-3-70b", "--hardware", "gh200", "--gpus", "4", "--max-model-len", "128k", "--explain"
    )
    assert "2 x 8 KV heads x 128 x 2 B = 4,096 B per token and layer" in text
    assert "a further token = 327,680 B" in text
    assert "42,949,672,960 B = 42.95 GB = 40.0 GiB" in text
    assert "450 to 64, 7.0x" in text
    assert len(re.findall(r"^\d\. ", text, re.MULTILINE)) == 8
    assert text.count("Assumes:") >= 7


def test_moe_example_reaches_and_misses_its_figure() -> None:
    text, data = moe_example()
    figures: Any = data
    ib = {entry["context"]: entry["ib_serial"] for entry in figures["filled"]}
    assert all(7 < ib[context] < 9 for context in (8192, 16_384, 32_768))
    assert ib[1024] < 3  # short contexts do not fill the baseline
    assert 19 < figures["kv_capacity_ratio"] < 22
    assert all(entry["ratio"] < 5 for entry in figures["one_node"])
    assert figures["one_node_8_users"] < 1
    assert all(7 < entry["ratio"] < 11 for entry in figures["kv_on_host"])
    assert "When it is not so" in text


def test_moe_example_names_three_ways_and_what_was_measured_beside_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(expert_links, "_FILE", str(tmp_path / "none.json"))
    text, data = moe_example()
    titles = re.findall(r"^\d\. .*$", text, re.MULTILINE)
    assert [title[:12] for title in titles] == [
        "1. Experts o", "2. KV copies", "3. KV that d", "4. When it i",
    ]  # fmt: skip
    rows: Any = data["expert_links"]
    assert [row["measured_2"] for row in rows] == [None] * 6 and text.count("not measured") == 6
    served, step = rows[0]["ratio"], rows[1]["ratio"]
    assert served["8"] == pytest.approx(7.98, abs=0.02) and step["8"] == pytest.approx(
        7.16, abs=0.03
    )
    assert min(served["2"], step["2"]) >= 1.9
    shared: Any = data["expert_links_shared"]
    assert all(ratio < 5 for ratio in shared.values())
    assert max(map(len, text.splitlines())) <= 100

    file = tmp_path / "rows.json"
    name = rows[0]["row"]
    times = [{"row": name, "gpus": gpus, "measured_s": s} for gpus, s in ((1, 32.6), (2, 17.0))]
    file.write_text(json.dumps({"rows": [*times, {"row": name, "gpus": 4, "measured_s": None}]}))
    monkeypatch.setattr(expert_links, "_FILE", str(file))
    text, data = moe_example()
    rows = data["expert_links"]
    assert rows[0]["measured_2"] == pytest.approx(32.6 / 17.0) and rows[1]["measured_2"] is None
    assert "1.92x\n" in text and text.count("not measured") == 5


def test_offload_example_says_what_three_times_needs_and_when_it_loses() -> None:
    text, data = offload_example()
    figures: Any = data
    hits = {entry["output"]: entry["hit"] for entry in figures["hit_for_3x"]}
    assert 2 / 3 < hits[1] < hits[64] < 1 and hits[1024] is None
    assert figures["gain_without_reuse"] <= 1.0001
    assert 1 < figures["break_even_gb_per_s"] < 20
    assert "When offload loses" in text
    hot: Any = data["hot_set"]
    assert hot["users_per_gpu"] == {"resident": 2, "hot": 11, "hot_and_prompts": 7}
    assert hot["bytes"]["resident"] == pytest.approx(3.69e9, rel=0.01)
    assert hot["bytes"]["hot"] == pytest.approx(0.80e9, rel=0.01)
    gains = [step["gain"] for step in hot["steps"] if step["slots"] == 4096]
    assert gains == sorted(gains) and gains[0] > 2.5 and gains[-1] < 3.1
    assert "from the hot set of each request" in text and "from prefixes found again" in text


def test_page_stands_alone_and_is_well_formed(tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    run("qwen3-30b-a3b", "--total-gib", "36", "--gpus", "1", "--users", "64", "--html", str(file))
    page = file.read_text("utf-8")
    assert not re.search(r"(src|href|url\()\s*=?\s*[\"']?https?:", page)
    assert "<script" not in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 4  # HBM, host, users against context, tokens/s against users
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "nan" not in picture and "inf" not in picture.replace("info", "")
    assert "limited by" in page


def test_profile_of_a_probe_is_one_that_plans_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    path = probe_path()
    assert tmp_path in path.parents
    figures: dict[str, Any] = json.loads(
        (Path("src/hotset/cost/hardware/l40s.json")).read_text("utf-8")
    )["figures"]
    figures["kernel_us"] = {"value": 2.5, "source": "hotset probe"}
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"name": "this", "measured": True, "figures": figures}))
    chips = load_hardware("this")
    assert chips.measured and chips.kernel_s == pytest.approx(2.5e-6)
    assert hardware_from_json({"figures": figures}, "mine").measured is False
    data = json.loads(run("smollm2-135m", "--hardware", "this", "--users", "2", "--json"))
    assert data["hardware"] == "this"
