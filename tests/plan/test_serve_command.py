"""The command that a plan prints is one that `hotset serve` takes, with the sizes planned."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from family_configs import build
from tiny_models import HYBRID_FAMILIES, make_config
from transformers import Mamba2Config

from hotset.bench.presets import PRESETS
from hotset.cli.plan import command as plan_command
from hotset.cli.serve import command as serve_command
from hotset.cost.catalog import bundled_config, bundled_models
from hotset.cost.families import shape_from_config
from hotset.options import OPTIONS, Options
from hotset.parallel.cuts import find_cuts
from hotset.plan.serve_command import model_to_serve


def planned(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(plan_command, [*arguments, "--json"], catch_exceptions=False)
    data: dict[str, Any] = json.loads(result.output)
    return data


def parsed_by_serve(command: str) -> dict[str, Any]:
    """What `hotset serve` makes of a command's words, without running it."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("hotset", "serve")
    params = dict(serve_command.make_context("serve", words).params)
    # Refuses what does not go together.
    Options.of(**{name: params[name] for name in set(OPTIONS) & set(params)})
    return params


H200 = ("--hardware", "h200", "--gpus", "1")
MOE = ("qwen3-30b-a3b", *H200, "--users", "64", "--max-model-len", "2k")
TP = ("--hardware", "h200", "--layout", "tp=2")
TWO = ("qwen3-30b-a3b", *TP, "--users", "64", "--max-model-len", "2k")
CASES = {
    "dense": (("llama-3-8b", *H200, "--users", "8"), {"expert_slots": None, "host_gib": 0.0}),
    "dense, fp8": (
        ("llama-3-8b", *H200, "--dtype", "fp8", "--kv-dtype", "fp8", "--hot-gib", "16"),
        {"dtype": "fp8", "kv_dtype": "fp8", "hot_gib": 16.0},
    ),
    "host tier": (
        ("llama-3-8b", *H200, "--users", "300", "--max-model-len", "8k", "--host-gib", "64"),
        {"host_gib": 64.0, "max_model_len": 8192, "total_gib": None},
    ),
    "host and disk tiers": (
        ("llama-3-8b", *H200, "--total-gib", "32", "--host-gib", "64", "--disk-gib", "100"),
        {"total_gib": 32.0, "host_gib": 64.0, "disk_gib": 100.0},
    ),
    "two GPUs, a plan of the engine's own": (
        ("gpt-oss-20b", *TP, "--dtype", "bfloat16"),
        {"tp": 2, "expert_slots": None},
    ),
    "two GPUs, lanes over slices": (
        ("qwen3-30b-a3b", "--hardware", "h200", "--layout", "dp=2,es=2", "--users", "64"),
        {"tp": 1, "dp": 2, "ep": False},
    ),
    "two GPUs, whole experts": (
        ("qwen3-30b-a3b", "--hardware", "h200", "--layout", "tp=2,ep=2", "--users", "64"),
        {"tp": 2, "dp": 1, "ep": True},
    ),
    "two GPUs, states": (("qwen3-next-80b-a3b", *TP, "--users", "2"), {"tp": 2}),
    "two GPUs": (
        (
            "llama-3-70b",
            "--hardware",
            "h200",
            "--layout",
            "tp=2",
            "--users",
            "8",
            "--host-gib",
            "64",
        ),
        {"tp": 2, "host_gib": 64.0},
    ),
    "experts in slots of two GPUs": (
        (*TWO, "--total-gib", "20"),
        {"tp": 2, "total_gib": 20.0, "host_gib": 0.0},
    ),
    "a state on two GPUs": (("qwen3-next-80b-a3b", *TP, "--users", "2"), {"tp": 2}),
    "sinks on two GPUs": (("gpt-oss-20b", *TP, "--dtype", "bfloat16"), {"tp": 2}),
    "whole attention on two GPUs": (("olmoe-1b-7b", *TP, "--users", "2"), {"tp": 2}),
    "all experts": ((*MOE,), {"expert_slots": None, "hot_gib": None}),
    "experts in slots": ((*MOE, "--total-gib", "40"), {"total_gib": 40.0, "host_gib": 0.0}),
    "slots that were given": (
        (*MOE, "--expert-slots", "32", "--hot-gib", "12"),
        {"expert_slots": 32, "hot_gib": 12.0},
    ),
    "no slots at all": (
        (*MOE, "--expert-slots", "0", "--hot-gib", "6"),
        {"expert_slots": 0, "expert_plan": "stream"},
    ),
    "a state beside KV": (
        ("qwen3.5-35b-a3b", *H200, "--users", "8"),
        {"expert_slots": None, "hot_gib": None, "host_gib": 0.0},
    ),
    "a state in the host tier too, and experts in slots": (
        ("qwen3-next-80b-a3b", *H200, "--users", "2", "--total-gib", "60", "--host-gib", "150"),
        {"total_gib": 60.0},
    ),
    "experts on disk": (
        (*MOE, "--total-gib", "24", "--host-gib", "20", "--disk-gib", "64"),
        {"total_gib": 24.0, "expert_host_gib": 20.0, "host_gib": 0.0},
    ),
}


@pytest.mark.parametrize(("arguments", "wanted"), CASES.values(), ids=CASES)
def test_the_command_of_a_plan_is_accepted_as_it_stands(
    arguments: tuple[str, ...], wanted: dict[str, Any]
) -> None:
    data = planned(*arguments)
    assert data["serve"]["why_not"] is None
    options = parsed_by_serve(data["serve"]["command"])
    assert {name: options[name] for name in wanted} == wanted
    assert options["max_num_seqs"] == data["users_running"]
    assert options["max_model_len"] == data["context_tokens"]
    share = data["resident"]["expert_share"]
    if share < 1:
        num_experts = 512 if arguments[0].startswith("qwen3-next") else 128
        assert options["expert_slots"] == int(share * num_experts + 1e-6)


def test_hot_gib_of_a_plan_that_splits_it_is_kv_alone_beside_its_slots() -> None:
    data = planned(*MOE, "--hot-gib", "36")
    options = parsed_by_serve(data["serve"]["command"])
    assert 0 < options["expert_slots"] < 128
    kv_gib = (data["resident"]["kv_bytes"]) / 2**30
    assert kv_gib <= options["hot_gib"] < 36


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("llama-3-70b", "--hardware", "h200", "--layout", "dp=2,tp=2"),
            "over 4 GPUs as tp=2,dp=2: plan tp=4, or for experts dp=4,es=4 or ep=4",
        ),
        (("deepseek-v3", "--hardware", "h200", "--dtype", "bfloat16", "--gpus", "8"), "GPUs"),
        (
            ("llama-4-scout", "--hardware", "h200", "--layout", "tp=4", "--users", "8"),
            "runs llama-4-scout with one GPU alone",
        ),
        (
            (*TWO, "--total-gib", "9", "--host-gib", "20", "--disk-gib", "64"),
            "keeps experts on disk with one GPU alone",
        ),
        (
            ("qwen3.5-35b-a3b", *H200, "--users", "1", "--hot-gib", "0.15", "--expert-slots", "9"),
            "three states of qwen3.5-35b-a3b on the device",
        ),
        (("llama-3-8b", *H200, "--dtype", "int4"), "no int4 weights"),
        (("llama-3-8b", *H200, "--kv-dtype", "int8"), "not int8"),
        ((*MOE, "--dtype", "fp8"), "experts in bfloat16"),
        (("gpt-oss-20b", *H200), "no mxfp4 weights"),
        (("gemma-3-27b", *H200, "--free-windows"), "--free-windows"),
        ((str(PRESETS["S-small"].model), *H200), "a shape without weights"),
        (("llama-3-8b", *H200, "--users", "1", "--max-model-len", "256k"), "131072 tokens"),
        (
            (*MOE, "--total-gib", "24", "--stream-kv", "--link", "c2c", "--expert-slots", "16"),
            "--stream-kv",
        ),
    ],
)
def test_a_plan_that_serve_cannot_run_says_why_in_one_line(
    arguments: tuple[str, ...], words: str
) -> None:
    serve = planned(*arguments)["serve"]
    assert serve["command"] is None
    assert words in serve["why_not"] and "\n" not in serve["why_not"]


@pytest.mark.parametrize("family", sorted(HYBRID_FAMILIES))
def test_a_plan_of_every_family_that_keeps_a_state_has_a_command(
    family: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(make_config(family, dtype="bfloat16").to_dict()))
    data = planned(str(file), *H200, "--users", "4", "--max-model-len", "256")
    assert data["serve"]["why_not"] is None and data["state_bytes_per_user"] > 0
    assert parsed_by_serve(data["serve"]["command"])["model"] == str(tmp_path)


def test_states_of_other_kinds_have_no_command(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(Mamba2Config(dtype="bfloat16").to_dict()))
    serve = planned(str(file), *H200, "--users", "4", "--max-model-len", "256")["serve"]
    assert serve["command"] is None and "does not run recurrent layers" in serve["why_not"]


def test_the_table_ends_with_the_command_or_the_reason() -> None:
    shown = CliRunner().invoke(plan_command, ["llama-3-8b", *H200]).output
    assert shown.splitlines()[-1].startswith("  hotset serve --model meta-llama/Llama-3.1-8B ")
    shown = CliRunner().invoke(plan_command, ["llama-3-8b", "--layout", "dp=2"]).output
    assert "no command to run it: hotset serve does not spread a model" in shown


def test_the_model_to_serve_is_a_hub_id_or_the_folder_of_a_config() -> None:
    source = "https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json, fields that set sizes"
    assert model_to_serve("qwen3-8b", source) == "Qwen/Qwen3-8B"
    assert model_to_serve("models/mine/config.json", "models/mine/config.json") == "models/mine"
    assert model_to_serve("org/model", "hub cache: /a/config.json") == "org/model"


@pytest.mark.parametrize("name", bundled_models())
def test_a_model_whose_plan_of_two_gpus_has_a_command_is_one_that_ranks_can_cut(name: str) -> None:
    tp = 3 if name.startswith("smollm2") else 2
    words = (name, "--hardware", "b200", "--layout", f"tp={tp}", "--dtype", "bfloat16")
    result = CliRunner().invoke(plan_command, [*words, "--users", "1", "--json"])
    if result.exception or not json.loads(result.output)["serve"]["command"]:
        return
    config, _ = bundled_config(name)
    table = find_cuts(build(config, "meta"), tp, name)
    layers = shape_from_config(config, name).layers
    is_counted_as_cut = any(layer.attention.shares.are_cut(tp) for layer in layers)
    assert any("self_attn" in path for path in table.cuts) == is_counted_as_cut
