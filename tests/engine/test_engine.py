"""What the engine refuses, and what a fault costs."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import reference, run
from tiny_models import make_model
from transformers import AutoModelForCausalLM

from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.errors import ConfigError, ModelError, RequestError
from hotset.executor.probe import inspect_model
from hotset.executor.step_input import StepInput
from hotset.model.loaded import LoadedModel
from hotset.request import FinishReason, SamplingParams

MakeEngine = Callable[..., Engine]


def prompts(num: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, 256) for _ in range(rng.randint(4, 30))] for _ in range(num)]


def test_a_step_that_runs_out_of_memory_costs_one_request(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    forward = engine.executor.runner.forward
    calls = 0

    def fail_once(step: StepInput, *options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(step, *options)

    monkeypatch.setattr(engine.executor.runner, "forward", fail_once)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    ids = [engine.add_request(prompt, params) for prompt in prompts(5)]
    tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
    errors = {}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is FinishReason.ERROR:
                errors[output.request_id] = output.error
    assert errors == {ids[4]: "the model step failed: out of memory"}
    expected = reference("llama", prompts(5), max_tokens=6)
    assert [tokens[request_id] for request_id in ids[:4]] == expected[:4]
    assert engine.kv.pool.num_held == 0


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "the prompt is empty"),
        ([1, 256], r"not in \[0, 256\)"),
        ([-1], r"not in \[0, 256\)"),
        ([5] * 96, "the longest context is 96"),
    ],
)
def test_a_prompt_that_can_never_run_is_refused_and_leaves_nothing(
    token_ids: list[int], message: str, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=message):
        engine.add_request(token_ids, SamplingParams())
    assert not engine.has_work


def test_a_request_id_that_is_in_use_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request([5], SamplingParams(), request_id="mine")
    with pytest.raises(RequestError, match="in use"):
        engine.add_request([5], SamplingParams(), request_id="mine")


def test_the_output_ends_at_the_context_limit(make_engine: MakeEngine) -> None:
    engine = make_engine()
    [tokens] = run(engine, [[5] * 90], max_tokens=None)  # type: ignore[arg-type]
    assert len(tokens) == 6


def test_tenants_do_not_find_each_others_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for salt in (b"alice", b"bob"):
        engine.add_request([7] * 40, SamplingParams(max_tokens=1), salt=salt)
        while engine.has_work:
            engine.step()
    assert engine.metrics.cached_tokens.total() == 0


def test_an_unsupported_layer_type_is_refused_by_name() -> None:
    model = make_model("llama")
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ModelError, match="chunked_attention"):
        inspect_model(model)


def test_a_model_with_state_space_layers_is_refused_by_name() -> None:
    from transformers import MambaConfig

    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    with pytest.raises(ModelError, match="Mamba"):
        inspect_model(model)


def test_an_encoder_decoder_is_refused_by_name() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        inspect_model(model)


def test_the_smallest_disk_tier_that_a_refusal_names_opens_and_holds_what_the_report_says(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"disk_gib .* holds no KV block") as refused:
        make_engine(disk_mib=1.024)
    smallest = float(str(refused.value).split("give ")[1].split()[0])
    engine = make_engine(disk_mib=smallest * 1024, disk_path=tmp_path)
    assert engine.tiers is not None
    [_, disk] = engine.tiers.infos
    capacity = disk.capacity_payloads
    [line] = [line for line in engine.report.splitlines() if line.startswith("KV, disk tier")]
    assert int(line.split()[4]) == capacity == 1


def test_the_report_says_what_goes_where(make_engine: MakeEngine) -> None:
    report = make_engine(host_blocks=10).report
    for word in ("weights", "workspace", "KV, hot tier", "KV, host tier", "users of a context"):
        assert word in report


def test_overlapping_steps_answer_every_kind_of_request_as_single_ones_do(
    make_engine: MakeEngine,
) -> None:
    kinds = [
        SamplingParams(max_tokens=20, ignore_eos=True),
        SamplingParams(max_tokens=20, stop_token_ids=tuple(range(3, 60))),  # ends by surprise
        SamplingParams(max_tokens=1, ignore_eos=True),
        SamplingParams(max_tokens=14, temperature=1.0, seed=7, n=3, ignore_eos=True),
        SamplingParams(max_tokens=14, repetition_penalty=1.5, logprobs=2, ignore_eos=True),
    ]
    answers = []
    for overlap in (False, True):
        engine = make_engine(hot_blocks=40, host_blocks=100, overlap=overlap)
        tokens: dict[tuple[str, int], list[int]] = {}
        reasons = {}
        for late in (False, True):  # the second half joins while the first runs
            for i, prompt in enumerate(prompts(10)[late::2]):
                params = kinds[i % len(kinds)]
                engine.add_request(prompt, params, request_id=f"{late}-{i}")
            for _ in range(5 if not late else 1000):
                for output in engine.step():
                    key = (output.request_id, output.index)
                    tokens[key] = tokens.get(key, []) + list(output.token_ids)
                    reasons[key] = output.finish_reason
                engine.kv.check()
        assert not engine.has_work
        assert engine.kv.pool.num_held == 0
        answers.append((tokens, reasons))
    assert answers[0] == answers[1]
    assert {reason for reason in answers[0][1].values() if reason is not None} == {
        FinishReason.LENGTH,
        FinishReason.STOP,
    }


def test_a_second_engine_over_a_model_counts_its_weights_as_the_first_did(
    make_engine: MakeEngine,
) -> None:
    first = make_engine()
    second = build_engine(
        first.options, LoadedModel(first.executor.runner._model, None, "m", "m", (2,), 512)
    )
    assert second.sizes.weights_bytes == first.sizes.weights_bytes > 0
    second.close()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "glm_moe_dsa"])
def test_what_is_no_number_in_one_request_does_not_reach_another(
    family: str, make_engine: MakeEngine
) -> None:
    """Blocks are given on as they are, and attention reads whole blocks."""
    engine = make_engine(family, block_size=16, hot_blocks=8)
    model = engine.executor.runner._model
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.inf
    prompts = [[11, 12, *[7] * 60], [13, 14, *[7] * 62]]
    clean = [list(range(20, 37)), list(range(40, 45))]
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(max_tokens=12))
    failed = []
    while engine.has_work:
        failed += [output.error for output in engine.step()]
    assert len(failed) == 2 and all(failed)  # by name: see `test_not_finite`
    assert run(engine, clean) == reference(family, clean)
