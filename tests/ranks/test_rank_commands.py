"""From a folder to answers and a benchmark over two ranks, as users start them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_models import make_model
from tiny_tokenizer import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from hotset import LLM, SamplingParams
from hotset.cli import cli
from hotset.errors import ConfigError, ModelError
from hotset.options import Options

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8], [9] * 20]


def save(folder: Path, family: str, **changes: object) -> str:
    make_model(family, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def answers(model: str, **options: object) -> list[tuple[int, ...]]:
    with LLM(model, device="cpu", max_model_len=64, **options) as llm:
        return [tuple(one.token_ids) for one in llm.generate(PROMPTS, PARAMS)]


def test_an_llm_of_two_ranks_answers_as_one_of_one(tmp_path: Path) -> None:
    vocabulary = {"vocab_size": len(make_tokenizer()) + 3}
    model = save(tmp_path, "mixtral", **vocabulary)
    assert answers(model, tp=2) == answers(model)


def test_what_cannot_be_spread_is_refused_in_one_line(tmp_path: Path) -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings"), 64)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    tokens = {"vocab_size": len(make_tokenizer()), "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("bitnet", **sizes, **heads, **tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no tensor-parallel plan .* use one GPU, or dp"):
        answers(str(tmp_path), tp=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"expert_slots": 2, "expert_cpu": "on"}, "expert_cpu is 'on', which works with one GPU"),
        ({"hot_gib": 1.0, "move_split": True}, "move_split is True, which works with one GPU"),
        ({"hot_tokens": 64}, "hot_tokens is 64, which works with one GPU"),
        ({"device": "cuda:1"}, "device is 'cuda:1', but tp=2 takes the first GPUs; give cuda"),
    ],
)
def test_options_of_one_gpu_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Options.of(tp=2, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tp": 2, "dp": 2}, "tp is 2 and dp is 2, which do not go together yet; give one"),
        ({"dp": 2, "disk_gib": 1.0}, "disk_gib is 1.0, and with dp there is no disk tier yet"),
        ({"dp": 2, "expert_slots": 2, "expert_cpu": "on"}, "leave it out, or leave dp out"),
        ({"tp": 2, "ep": True, "expert_slots": 2}, "with ep all experts stay on the GPUs"),
        ({"ep": True}, "ep is given, which does nothing with one GPU; give tp or dp"),
        ({"dp": 2, "gpus": 4}, "gpus is 4, and dp=2,es=2 takes 2; give one of them"),
    ],
)
def test_layouts_that_cannot_work_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Options.of(**options)


def test_lanes_need_experts_to_share(tmp_path: Path) -> None:
    model = save(tmp_path, "llama", vocab_size=len(make_tokenizer()))
    with pytest.raises(
        ConfigError, match=r"dp=2 has ranks share experts, and .* has none; give tp"
    ):
        answers(model, dp=2)


@pytest.mark.parametrize(
    ("spread", "memory"),
    [
        ({"dp": 2}, {"hot_gib": 0.01}),
        *(
            pytest.param(*both, marks=pytest.mark.many)
            for both in (
                ({"tp": 2, "ep": True}, {}),
                ({"dp": 2}, {}),
                ({"dp": 2, "ep": True}, {}),
                ({"dp": 2, "ep": True}, {"hot_gib": 0.01}),
                ({"tp": 2, "ep": True}, {"hot_gib": 0.01}),
            )
        ),
    ],
)
def test_an_llm_that_shares_experts_answers_as_one_of_one(
    spread: dict[str, object], memory: dict[str, object], tmp_path: Path
) -> None:
    model = save(tmp_path, "mixtral", vocab_size=len(make_tokenizer()) + 3)
    assert answers(model, **spread, **memory) == answers(model)


def test_the_benchmark_runs_over_two_ranks_and_verifies_its_arms(tmp_path: Path) -> None:
    config = make_model("llama").config
    config.save_pretrained(tmp_path)
    out = tmp_path / "result.json"
    asked = "--users 4 --turns 3 --first-tokens 32 --new-tokens 16 --output-tokens 4 --verify"
    command = ["bench", "multiturn", "--model", str(tmp_path), "--dummy-weights", "--device", "cpu"]
    command += [*asked.split(), "--arms", "hot,host+disk", "--tp", "2", "--out", str(out)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert "verified against hot: host+disk differs in 0 of 12 answers" in result.output
    assert {run["arm"] for run in json.loads(out.read_text())["runs"]} == {"hot", "host+disk"}
