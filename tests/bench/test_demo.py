import json
from array import array

import pytest
import torch
from click.testing import CliRunner
from fakes import once
from tiny_models import make_model
from tiny_tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, make_tokenizer

from hotset.bench.campaign import Order, Target, run_bench
from hotset.bench.demo import (
    context_tokens,
    differing,
    distinct_tokens,
    recomputed_tokens,
    run_demo,
    said,
    why,
)
from hotset.bench.play import Record, Said
from hotset.bench.presets import PRESETS
from hotset.bench.runs import RunOptions, Say
from hotset.bench.text_work import pick_documents
from hotset.bench.verdict import fetched_tokens
from hotset.bench.workload import Spec, make_work
from hotset.cli import cli
from hotset.errors import ConfigError
from hotset.model.loaded import LoadedModel
from hotset.options import Options


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model with a tokenizer in place of the default one."""

    def load_tiny(name: str | None, **where: object) -> LoadedModel:
        torch.set_num_threads(1)
        model = make_model("llama", vocab_size=VOCAB_SIZE, max_position_embeddings=1024)
        return LoadedModel(model, make_tokenizer(), "tiny", "tiny", (EOS_TOKEN_ID,), 1024)

    monkeypatch.setattr("hotset.bench.campaign.load_model", load_tiny)


SMALL = {"users": 8, "turns": 2, "first_tokens": 200, "output_tokens": 8}
SILENT = Say(lambda line: None, lambda make: None)


def test_a_small_demo_gives_the_same_answers_with_less_computed() -> None:
    lines: list[str] = []
    # A model this small computes faster than it fetches, so `auto` would fetch nothing.
    options = Options.of(**PRESETS["demo"].engine, fetch_policy="fetch")
    say = Say(lines.append, lambda make: lines.append(make()))
    result = run_demo("demo", say, options=options, **SMALL)

    one, two = result.runs
    assert differing(result) == []
    assert len(one.records) == len(two.records) == 8 * 2
    assert context_tokens(two) >= 4 * two.sizes["hot_tokens"]
    assert fetched_tokens(one) == 0
    assert fetched_tokens(two) > 0
    assert two.engine["computed_tokens"] < one.engine["computed_tokens"]
    assert 0 <= recomputed_tokens(two) < recomputed_tokens(one)
    assert one.engine["faults"] == two.engine["faults"] == {}
    assert all(len(said(r).gaps) == r.num_tokens for r in (*one.records, *two.records))
    for run in (one, two):
        [last] = [line for line in lines if line.startswith(f"{run.arm}: 16 of 16 requests")]
        assert last.endswith(f"{run.output_tokens_per_s:,.0f} of output")


def test_a_later_turn_is_the_whole_conversation_and_one_more_question() -> None:
    sizes = {"users": 1, "turns": 2, "first_tokens": 64, "output_tokens": 4}
    result = run_demo("demo", SILENT, **sizes)
    first, second = map(said, result.runs[1].records)
    assert second.prompt[: len(first.prompt)] == first.prompt
    assert first.question != second.question


def test_each_user_reads_another_text() -> None:
    documents = pick_documents(24)
    assert len({title for title, _ in documents}) == 24
    assert all(len(text) > 3000 for _, text in documents)
    assert len(pick_documents(256)) == 256  # more users than texts: some read the same


def test_shared_beginnings_count_once() -> None:
    assert distinct_tokens([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [1, 2, 3, 4, 5]]) == 4 + 1 + 2
    assert distinct_tokens([[1, 2], [3, 2]]) == 4


def test_contexts_that_the_model_does_not_serve_are_refused_before_a_run() -> None:
    sizes = {"users": 1, "turns": 1, "first_tokens": 2000, "output_tokens": 8}  # model: 1024
    with pytest.raises(ConfigError, match=r"contexts of .* tokens but the model .* serve 1024"):
        run_demo("demo", SILENT, **sizes)


def test_text_is_refused_where_nothing_reads_it() -> None:
    with pytest.raises(ConfigError, match="`documents` is text, which needs a model with a token"):
        make_work(Spec("documents"), VOCAB_SIZE)
    order = Order(Spec("questions"), Options.of(), False, [], 1, RunOptions(), Target("http://x"))
    with pytest.raises(ConfigError, match="`questions` is text, which no server is sent"):
        run_bench(order, SILENT)


def test_the_command_prints_the_table_and_says_that_tokens_are_identical(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hotset.bench.demo.run_demo", once(run_demo))
    sizes = ["--users", "8", "--turns", "2", "--document-tokens", "200", "--answer-tokens", "8"]
    shown = CliRunner().invoke(cli, ["demo", *sizes], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "identical in all 16 answers" in shown.stdout
    assert "output tokens/s" in shown.stdout
    assert "with tiers" in shown.stdout
    assert "host+disk: 16 of 16 requests" in shown.stderr

    as_json = CliRunner().invoke(cli, ["demo", *sizes, "--json"])
    data = json.loads(as_json.stdout)
    assert data["differing"] == []
    assert len(data["tiered"]["turns"]) == 16
    assert data["speedup"] > 0


def test_a_difference_is_told_with_its_cause() -> None:
    def turn(prompt: list[int], tokens: list[int], gap: float) -> Record:
        gaps = [3.0] * (len(tokens) - 1) + [gap]
        one = Said("title", "question", prompt, "answer", True, gaps)
        return Record(0, 0, len(prompt), 0.0, token_ids=array("i", tokens), said=one)

    first = turn([1], [5, 6], 2e-5)
    assert "token 2, where the two likeliest were 0.000020 apart (a tie" in why(
        first, turn([1], [5, 7], 1e-5)
    )
    assert "no tie: an error" in why(first, turn([1], [5, 7], 0.5))
    assert "follows another answer" in why(first, turn([2], [5, 7], 0.5))
    assert "longer" in why(first, turn([1], [5, 6, 7], 0.5))
