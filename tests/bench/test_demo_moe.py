"""The demo of expert buffering, over a tiny model that went the same way as the real one."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_models import make_model
from tiny_tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, make_tokenizer

from hotset import demo_moe
from hotset.cli import cli
from hotset.demo_moe import Progress, Workload, run_demo
from hotset.errors import EngineError, ModelError
from hotset.model.loaded import LoadedModel
from hotset.model.loader import load_model
from hotset.model.upcycled_model import upcycle


@pytest.fixture
def load_tiny(tmp_path: Path) -> Callable[[], LoadedModel]:
    torch.set_num_threads(1)
    model = make_model("llama", vocab_size=VOCAB_SIZE)
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "tiny", num_experts=8, top_k=2, noise=0.2)
    return lambda: load_model(str(tmp_path / "tiny"), device="cpu", dtype="float32")


def test_a_quarter_of_the_experts_gives_the_same_tokens_and_counts_what_it_moves(
    load_tiny: Callable[[], LoadedModel],
) -> None:
    seen: list[Progress] = []
    result = run_demo(Workload(users=5, answer_tokens=12), seen.append, load=load_tiny)
    one, two = result.all_here, result.quarter
    assert result.differing == []
    assert (result.num_layers, result.num_experts, result.num_slots) == (3, 8, 2)
    assert len(one.answers) == 5 and one.output_tokens == two.output_tokens > 0
    assert (one.hits, one.misses, one.moved_bytes, one.hit_rate) == (0, 0, 0, None)
    assert one.host_bytes == 0 and two.host_bytes >= one.device_bytes
    assert two.device_bytes == two.host_bytes // 4
    assert two.hits > 0 and two.misses > 0
    assert two.moved_bytes == two.misses * (two.host_bytes // (3 * 8))
    for name, run in ((demo_moe.ALL, one), (demo_moe.QUARTER, two)):
        assert [p for p in seen if p.name == name][-1].output_tokens == run.output_tokens


def test_a_model_without_experts_and_a_request_that_fails_are_errors(
    load_tiny: Callable[[], LoadedModel],
) -> None:
    def load_dense() -> LoadedModel:
        model = make_model("llama", vocab_size=VOCAB_SIZE)
        return LoadedModel(model, make_tokenizer(), "tiny", "tiny", (EOS_TOKEN_ID,), 512)

    with pytest.raises(ModelError, match="tiny has no experts"):
        run_demo(Workload(), lambda progress: None, load=load_dense)
    with pytest.raises(EngineError, match="demo-moe, all experts: "):
        run_demo(Workload(users=1, answer_tokens=8), lambda progress: None, load=failing(load_tiny))


def failing(load: Callable[[], LoadedModel]) -> Callable[[], LoadedModel]:
    """A model whose steps fail once the engine has started."""

    def load_failing() -> LoadedModel:
        loaded = load()
        forward, calls = loaded.model.forward, []

        @functools.wraps(forward)
        def fail_later(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) > 8:  # more than a start has
                raise RuntimeError("out of memory")
            return forward(*args, **kwargs)

        loaded.model.forward = fail_later
        return loaded

    return load_failing


def test_the_command_prints_what_was_measured_and_what_to_do_next(
    load_tiny: Callable[[], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(demo_moe.run_demo.__kwdefaults__, "load", load_tiny)
    words = ["demo-moe", "--users", "3", "--answer-tokens", "8"]
    shown = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "Tokens: identical in all 3 answers." in shown.stdout
    assert "not trained as a Mixture of Experts" in shown.stdout
    assert "2 of 8 resident" in shown.stdout and "hit rate" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "Next: hotset serve --model tiny --expert-slots 2"
    assert "a quarter of them: starting" in shown.stderr
    data = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    quarter = data["quarter"]
    assert data["differing"] == []
    assert quarter["hit_rate"] == quarter["hits"] / (quarter["hits"] + quarter["misses"])
    assert quarter["tokens_per_s"] == quarter["output_tokens"] / quarter["wall_s"]
