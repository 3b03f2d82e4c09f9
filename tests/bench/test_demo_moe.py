"""The demo of expert buffering, over a tiny model that went the same way as the real one."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fakes import once
from tiny_models import make_model
from tiny_tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, make_tokenizer

from hotset.bench.demo import differing, run_demo
from hotset.bench.runs import Say
from hotset.cli import cli
from hotset.errors import EngineError
from hotset.model.loaded import LoadedModel
from hotset.model.loader import load_model
from hotset.model.upcycled_model import upcycle

SILENT = Say(lambda line: None, lambda make: None)
Load = Callable[..., LoadedModel]


@pytest.fixture
def load_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a tiny upcycled model in place of the real one."""
    torch.set_num_threads(1)
    model = make_model("llama", vocab_size=VOCAB_SIZE)
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "tiny", num_experts=8, top_k=2, noise=0.2)

    def load(name: str | None, **where: object) -> LoadedModel:
        return load_model(str(tmp_path / "tiny"), device="cpu", dtype="float32")

    monkeypatch.setattr("hotset.bench.campaign.load_model", load)
    return load


def test_a_quarter_of_the_experts_gives_the_same_tokens_and_counts_what_it_moves(
    load_tiny: Load,
) -> None:
    lines: list[str] = []
    result = run_demo("demo-moe", Say(lines.append, lambda make: None), users=5, output_tokens=12)
    one, two = result.runs
    assert differing(result) == []
    sizes = [two.sizes[name] for name in ("expert_layers", "experts_per_layer", "expert_slots")]
    assert sizes == [3, 8, 2]
    assert len(one.records) == 5 and one.output_tokens == two.output_tokens > 0
    counts = [one.engine[name] for name in ("expert_hits", "expert_misses", "expert_bytes")]
    assert counts == [0, 0, 0] and one.engine["expert_hit_rate"] is None
    all_bytes, host_bytes = one.sizes["experts_device_bytes"], two.sizes["experts_host_bytes"]
    assert one.sizes["experts_host_bytes"] == 0 and host_bytes >= all_bytes
    assert two.sizes["experts_device_bytes"] == host_bytes // 4
    hits, misses = two.engine["expert_hits"], two.engine["expert_misses"]
    assert hits > 0 and misses > 0
    assert two.engine["expert_bytes"] == misses * (host_bytes // (3 * 8))
    for run in (one, two):
        [last] = [line for line in lines if line.startswith(f"{run.arm}: 5 of 5 requests")]
        assert last.endswith(f"{run.output_tokens_per_s:,.0f} of output")


def test_a_model_without_experts_and_a_request_that_fails_are_errors(
    load_tiny: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dense(name: str | None, **where: object) -> LoadedModel:
        model = make_model("llama", vocab_size=VOCAB_SIZE)
        return LoadedModel(model, make_tokenizer(), "tiny", "tiny", (EOS_TOKEN_ID,), 512)

    monkeypatch.setattr("hotset.bench.campaign.load_model", load_dense)
    with pytest.raises(EngineError, match="no experts"):
        run_demo("demo-moe", SILENT)
    monkeypatch.setattr("hotset.bench.campaign.load_model", failing(load_tiny))
    with pytest.raises(EngineError, match="demo-moe, resident: "):
        run_demo("demo-moe", SILENT, users=1, output_tokens=8)


def failing(load: Load) -> Load:
    """A model whose steps fail once the engine has started."""

    def load_failing(name: str | None, **where: object) -> LoadedModel:
        loaded = load(name)
        forward, calls = loaded.model.forward, []

        @functools.wraps(forward)
        def fail_later(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) > 16:  # more than a start and its warm-up have
                raise RuntimeError("out of memory")
            return forward(*args, **kwargs)

        loaded.model.forward = fail_later
        return loaded

    return load_failing


def test_the_command_prints_what_was_measured_and_what_to_do_next(
    load_tiny: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotset.bench.demo.run_demo", once(run_demo))
    words = ["demo-moe", "--users", "3", "--answer-tokens", "8"]
    shown = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "Tokens: identical in all 3 answers." in shown.stdout
    assert "not trained as a Mixture of Experts" in shown.stdout
    assert "2 of 8 resident" in shown.stdout and "hit rate" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "Next: hotset serve --model tiny --expert-slots 2"
    assert "experts: started in" in shown.stderr
    data = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    quarter = data["quarter"]
    assert data["differing"] == []
    assert quarter["hit_rate"] == quarter["hits"] / (quarter["hits"] + quarter["misses"])
    assert quarter["tokens_per_s"] == quarter["output_tokens"] / quarter["wall_s"]
