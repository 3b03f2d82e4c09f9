import json

import pytest
import torch
from click.testing import CliRunner
from tiny_models import make_model
from tiny_tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, make_tokenizer

from hotset import demo
from hotset.cli import cli
from hotset.cli.demo import _why
from hotset.demo import Progress, Turn, Workload, distinct_tokens, pick_documents, run_demo
from hotset.errors import EngineError
from hotset.model.loaded import LoadedModel


def load_tiny() -> LoadedModel:
    torch.set_num_threads(1)
    model = make_model("llama", vocab_size=VOCAB_SIZE, max_position_embeddings=1024)
    return LoadedModel(model, make_tokenizer(), "tiny", "tiny", (EOS_TOKEN_ID,), 1024)


SMALL = Workload(users=8, turns=2, document_tokens=200, answer_tokens=8)


def test_a_small_demo_gives_the_same_answers_with_less_computed() -> None:
    seen: list[Progress] = []
    # A model this small computes faster than it fetches, so `auto` would fetch nothing.
    result = run_demo(SMALL, seen.append, load=load_tiny, fetch_policy="fetch")

    one, two = result.hot_only, result.tiered
    assert result.differing == []
    assert len(one.turns) == len(two.turns) == SMALL.users * SMALL.turns
    assert two.context_tokens >= 4 * two.hot_tokens
    assert one.fetched_tokens == 0
    assert two.fetched_tokens > 0
    assert two.computed_tokens < one.computed_tokens
    assert 0 <= two.recomputed_tokens < one.recomputed_tokens
    assert one.faults == two.faults == {}
    assert all(len(turn.gaps) == len(turn.token_ids) for turn in (*one.turns, *two.turns))
    for name, run in ((demo.HOT_ONLY, one), (demo.TIERED, two)):
        last = [progress for progress in seen if progress.name == name][-1]
        assert (last.turns, last.output_tokens) == (len(run.turns), run.output_tokens)


def test_a_later_turn_is_the_whole_conversation_and_one_more_question() -> None:
    result = run_demo(Workload(1, 2, 64, 4), lambda progress: None, load=load_tiny)
    first, second = result.tiered.turns
    assert second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids
    assert first.question != second.question


def test_each_user_reads_another_text() -> None:
    documents = pick_documents(24)
    assert len({title for title, _ in documents}) == 24
    assert all(len(text) > 3000 for _, text in documents)
    assert len(pick_documents(256)) == 256  # more users than texts: some read the same


def test_shared_beginnings_count_once() -> None:
    assert distinct_tokens([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [1, 2, 3, 4, 5]]) == 4 + 1 + 2
    assert distinct_tokens([[1, 2], [3, 2]]) == 4


def test_a_request_that_fails_ends_the_demo_with_its_reason() -> None:
    workload = Workload(users=1, turns=1, document_tokens=2000, answer_tokens=8)  # model: 1024
    with pytest.raises(EngineError, match=r"user 1: the prompt has .* longest context"):
        run_demo(workload, lambda progress: None, load=load_tiny)


def test_the_command_prints_the_table_and_says_that_tokens_are_identical(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(demo.run_demo.__kwdefaults__, "load", load_tiny)
    sizes = ["--users", "8", "--turns", "2", "--document-tokens", "200", "--answer-tokens", "8"]
    shown = CliRunner().invoke(cli, ["demo", *sizes])
    assert shown.exit_code == 0, shown.output
    assert "identical in all 16 answers" in shown.stdout
    assert "output tokens/s" in shown.stdout
    assert "with tiers: 16 of 16 turns" in shown.stderr

    as_json = CliRunner().invoke(cli, ["demo", *sizes, "--json"])
    data = json.loads(as_json.stdout)
    assert data["differing"] == []
    assert len(data["tiered"]["turns"]) == 16
    assert data["speedup"] > 0


def test_a_difference_is_told_with_its_cause() -> None:
    def turn(prompt: tuple[int, ...], tokens: tuple[int, ...], gap: float) -> Turn:
        gaps = (3.0,) * (len(tokens) - 1) + (gap,)
        return Turn(0, 0, "title", "question", "answer", True, prompt, tokens, gaps, 0.1)

    first = turn((1,), (5, 6), 2e-5)
    assert "token 2, where the two likeliest were 0.000020 apart (a tie" in _why(
        first, turn((1,), (5, 7), 1e-5)
    )
    assert "no tie: an error" in _why(first, turn((1,), (5, 7), 0.5))
    assert "follows another answer" in _why(first, turn((2,), (5, 7), 0.5))
    assert "longer" in _why(first, turn((1,), (5, 6, 7), 0.5))
