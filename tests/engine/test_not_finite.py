"""A request whose logits are not finite fails by name, alone, and nothing that it stored is found.

The embedding of one token is NaN, and with it all that is computed after that token.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import make_prompts, run
from fake_flashinfer import FakeRecorder
from test_hot_requests import WIDE
from test_simulated import use_kernels

from hotset.engine import rank_setup
from hotset.engine.engine import Engine
from hotset.executor import graphs
from hotset.request import FinishReason, RequestOutput, SamplingParams

MakeEngine = Callable[..., Engine]
POISON = 255
SAMPLED = {"temperature": 0.8, "seed": 3}


def embedding_of(engine: Engine) -> torch.Tensor:
    weight: torch.Tensor = engine.executor.runner._model.get_input_embeddings().weight.data  # type: ignore[attr-defined]
    return weight[POISON]


def healthy(num: int = 4) -> list[list[int]]:
    """Prompts without the token; no request generates it in the few tokens asked for."""
    return [[token % POISON for token in prompt] for prompt in make_prompts(num=num)]


def answer(
    engine: Engine, prompts: list[list[int]], **params: Any
) -> tuple[list[list[int]], list[RequestOutput]]:
    """Tokens of each prompt, and its last output."""
    asked = SamplingParams(max_tokens=8, ignore_eos=True, **params)
    ids = [engine.add_request(prompt, asked) for prompt in prompts]
    tokens: dict[str, list[int]] = {each: [] for each in ids}
    last = {}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                last[output.request_id] = output
        engine.kv.check()
    return [tokens[each] for each in ids], [last[each] for each in ids]


def assert_failed(output: RequestOutput) -> None:
    assert output.finish_reason is FinishReason.ERROR
    assert output.error is not None and "logits for the next token are NaN or" in output.error


@pytest.mark.parametrize("family", ["llama", "deepseek_v32", "qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("params", [{}, SAMPLED, {**SAMPLED, "top_p": 0.9}], ids=str)
def test_one_request_fails_and_its_neighbours_answer_as_ever(
    family: str, overlap: bool, params: dict[str, Any], make_engine: MakeEngine
) -> None:
    prompts = healthy()
    options = {"overlap": overlap, "hot_blocks": 256, "max_num_batched_tokens": 64}
    expected = run(make_engine(family, **options), prompts, max_tokens=8, **params)
    engine = make_engine(family, **options)
    embedding_of(engine).fill_(torch.nan)
    poisoned = [*prompts[:2], [5, POISON, 6], *prompts[2:]]

    found, last = answer(engine, poisoned, **params)

    assert found[:2] + found[3:] == expected
    assert not found[2]
    assert_failed(last[2])
    assert [one.finish_reason for one in last].count(FinishReason.ERROR) == 1
    assert engine.metrics.faults["not_finite"] == 1
    assert engine.kv.pool.num_held == 0


def test_a_request_that_turns_bad_as_it_answers_fails_there(make_engine: MakeEngine) -> None:
    """One of the tokens that it chooses has the embedding that is NaN."""
    prompts = healthy(3)
    expected = run(make_engine("llama"), prompts, max_tokens=8)
    others = {token for each in (*prompts, *expected[::2]) for token in each}
    bad = next(token for token in expected[1][:-1] if token not in others)
    first = expected[1].index(bad) + 1
    engine = make_engine("llama", overlap=True)
    model = engine.executor.runner._model  # type: ignore[attr-defined]
    model.get_input_embeddings().weight.data[bad] = torch.nan

    found, last = answer(engine, prompts)

    assert found == [expected[0], expected[1][:first], expected[2]]
    assert_failed(last[1])


def test_recorded_steps_fail_one_request_too(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_setup, "pack_linears", lambda model: None)
    changes = {**WIDE, "mlp_layer_types": ["dense"] * 3}
    expected = run(make_engine("glm_moe_dsa", model_changes=changes), healthy(), max_tokens=8)
    use_kernels(monkeypatch)
    monkeypatch.setattr(graphs, "GraphRecorder", FakeRecorder)
    engine = make_engine("glm_moe_dsa", model_changes=changes, max_num_seqs=6, overlap=True)
    runner = engine.executor.runner  # type: ignore[attr-defined]
    runner.record(max_num_tokens=64, max_context_blocks=24, scratch_block=engine.sizes.num_blocks)
    embedding_of(engine).fill_(torch.nan)

    found, last = answer(engine, [*healthy(), [9, 8, POISON, 7]])

    assert found == [*expected, []]
    assert_failed(last[4])


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("params", [{}, SAMPLED], ids=str)
def test_overlapped_recorded_steps_on_a_gpu_fail_one_request(
    params: dict[str, Any], make_engine: MakeEngine
) -> None:
    """Tokens are compared between equal batches, as rounding depends on these."""
    options = {"device": "cuda", "model_dtype": torch.float16, "kv_bytes": 2, "hot_blocks": 256}
    options |= {"model_changes": {"head_dim": 128}, "block_size": 16}
    batch = [*healthy()[:2], [5, POISON, 6], *healthy()[2:]]
    found = []
    for value in (0.0, torch.nan):
        engine = make_engine("llama", **options)
        assert engine.executor.runner._graphs is not None
        embedding_of(engine).fill_(value)
        for others in ([], [[5, POISON, 7]]):
            answers, last = answer(engine, [*batch, *others], **params)
            failed = [i for i, one in enumerate(last) if one.error is not None]
            given = [i for i, prompt in enumerate([*batch, *others]) if POISON in prompt]
            chosen = [i for i, each in enumerate(answers) if POISON in each[:-1]]
            assert failed == (sorted({*given, *chosen}) if value else [])
            assert all(len(each) == 8 for i, each in enumerate(answers) if i not in failed)
            assert engine.kv.pool.num_held == 0
            found.append([each[0] for i, each in enumerate(answers) if i not in given])
    # A step with a request less may round otherwise, but the first step is the same batch.
    assert found[0] == found[2]


@pytest.mark.parametrize("family", ["llama", "deepseek_v32", "qwen3_next"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("has_tiers", [False, True])
def test_nothing_that_it_stored_is_found_again(
    family: str, overlap: bool, has_tiers: bool, make_engine: MakeEngine, tmp_path: Path
) -> None:
    prompt = [*range(10, 40), POISON, *range(40, 85)]  # with a state that is kept at 64
    options: dict[str, Any] = {"overlap": overlap, "max_num_batched_tokens": 16}
    if has_tiers:
        options |= {"host_blocks": 40, "disk_mib": 8, "disk_path": tmp_path}
        options["fetch_policy"] = "fetch"
    expected = run(make_engine(family, hot_blocks=256), [prompt], max_tokens=8)
    engine = make_engine(family, hot_blocks=256, **options)
    row = embedding_of(engine)
    value = row.clone()
    row.fill_(torch.nan)
    _, last = answer(engine, [prompt])
    assert_failed(last[0])
    while engine.has_transfers:
        engine.step()
    assert engine.kv.pool.num_cached == engine.kv.pool.num_held == 0
    if has_tiers:
        assert engine.tiers is not None
        assert [usage.used_payloads for usage in engine.tiers.usage()] == [0, 0]
    row.copy_(value)

    found, last = answer(engine, [prompt])

    assert found == expected
    assert last[0].cached_tokens == 0
    again, last = answer(engine, [prompt])  # what is sound is found
    assert again == expected and last[0].cached_tokens > 0


def test_siblings_of_a_prompt_fail_each(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", overlap=True)
    embedding_of(engine).fill_(torch.nan)
    engine.add_request([5, POISON, 6], SamplingParams(max_tokens=4, n=3))
    ended = []
    while engine.has_work:
        ended += [one for one in engine.step() if one.finish_reason is not None]
        engine.kv.check()
    assert len(ended) == 3
    for one in ended:
        assert_failed(one)
