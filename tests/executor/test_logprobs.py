"""Log-probabilities of prompts are those of transformers, whatever the engine does meanwhile."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from engines import reference, run
from tiny_models import make_model

from hotset.cost.workspace import most_scored_rows
from hotset.engine.engine import Engine
from hotset.executor import logprobs
from hotset.request import FinishReason, RequestOutput, SamplingParams

MakeEngine = Callable[..., Engine]
TOP = 3


def make_prompts(num: int = 8) -> list[list[int]]:
    """Prompts that share beginnings, so that prefixes would be found."""
    rng = random.Random(3)
    shared = [rng.randrange(3, 256) for _ in range(24)]
    return [
        shared[: rng.choice((0, 8, 24))]
        + [rng.randrange(3, 256) for _ in range(rng.randint(1, 30))]
        for _ in range(num)
    ]


def ask(
    engine: Engine, prompts: Sequence[list[int]], **params: Any
) -> dict[str, list[RequestOutput]]:
    """Run all prompts at once; the outputs of each by `id#index`."""
    options = {"max_tokens": 4, "ignore_eos": True, "prompt_logprobs": TOP, **params}
    for i, prompt in enumerate(prompts):
        engine.add_request(prompt, SamplingParams(**options), request_id=str(i))
    found: dict[str, list[RequestOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            found.setdefault(f"{output.request_id}#{output.index}", []).append(output)
        engine.kv.check()
    return found


def check(
    outputs: list[RequestOutput], prompt: list[int], family: str = "llama", device: str = "cpu"
) -> None:
    """Compare with log_softmax over transformers' logits, in float32."""
    model = make_model(family).to(device)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model(torch.tensor([prompt], device=device)).logits[0, :-1]
    expected = logits.float().log_softmax(-1).cpu()  # [T - 1, V]
    first, *later = outputs
    assert not any(output.prompt_logprobs for output in later)
    entries = first.prompt_logprobs
    assert [entry.token_id for entry in entries] == prompt[1:]
    for entry, row in zip(entries, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=2e-4)
        assert len(entry.top) == TOP
        values = [value for _, value in entry.top]
        assert values == pytest.approx(row.topk(TOP).values.tolist(), abs=2e-4)
        assert [row[i].item() for i, _ in entry.top] == pytest.approx(values, abs=2e-4)
        least = (row > row[entry.token_id] + 1e-3).sum() + 1
        most = (row > row[entry.token_id] - 1e-3).sum() + 1
        assert least <= (entry.rank or 0) <= most
        assert (entry.logprob == max(values)) == (entry.rank == 1)  # lm-eval's "is greedy"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_they_are_those_of_transformers_also_where_the_prefix_is_cached(
    family: str, overlap: bool, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, overlap=overlap, max_num_batched_tokens=32)
    engine.scheduler.max_scored_tokens = 7
    prompts = make_prompts()
    expected = reference(family, prompts, max_tokens=4)
    for _ in range(2):
        found = ask(engine, prompts)
        for i, prompt in enumerate(prompts):
            outputs = found[f"{i}#0"]
            check(outputs, prompt, family)
            assert [t for output in outputs for t in output.token_ids] == expected[i]
            assert outputs[-1].cached_tokens == 0
    assert run(engine, prompts, max_tokens=4) == expected
    assert sum(engine.metrics.cached_tokens.values()) > 0  # of those that did not ask


def test_a_request_that_gives_way_brings_each_of_them_once(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(hot_blocks=26, host_blocks=200, overlap=True, max_num_batched_tokens=32)
    engine.scheduler.ahead_tokens = 1
    engine.scheduler.max_scored_tokens = 7
    prompts = make_prompts()
    found = ask(engine, prompts, max_tokens=20)
    assert engine.metrics.preemptions > 0
    for i, prompt in enumerate(prompts):
        check(found[f"{i}#0"], prompt)
    expected = reference("llama", prompts, max_tokens=20)
    assert [[t for o in found[f"{i}#0"] for t in o.token_ids] for i in range(8)] == expected


def test_a_prompt_in_the_middle_of_preemption_is_not_taken_for_cached(
    make_engine: MakeEngine,
) -> None:
    """Its own blocks are found again, those of its prompt that others computed are not."""
    engine = make_engine(host_blocks=100, overlap=True, max_num_batched_tokens=32)
    engine.scheduler.max_scored_tokens = 5
    [prompt] = [[*range(3, 60)]]
    run(engine, [prompt], max_tokens=2)  # all of it is cached now
    engine.add_request(
        prompt, SamplingParams(max_tokens=2, prompt_logprobs=TOP, ignore_eos=True), request_id="0"
    )
    outputs, num_steps = [], 0
    while engine.has_work:
        outputs += engine.step()
        num_steps += 1
        if num_steps == 5:
            scored = engine.scheduler.running[0].num_scored_tokens
            assert scored is not None and 8 <= scored < 40
            engine.scheduler._preempt_last()
    check(outputs, prompt)
    assert engine.metrics.preemptions == 1
    assert sum(engine.metrics.cached_tokens.values()) == 0
    assert 0 < sum(engine.metrics.resumed_tokens.values()) < 40


def test_n_outputs_share_what_the_first_brings(make_engine: MakeEngine) -> None:
    engine = make_engine(overlap=True)
    prompts = make_prompts(3)
    found = ask(engine, prompts, n=3, temperature=1.0, seed=1)
    for i, prompt in enumerate(prompts):
        check(found[f"{i}#0"], prompt)
        for j in (1, 2):
            assert not any(output.prompt_logprobs for output in found[f"{i}#{j}"])
            assert sum(len(output.token_ids) for output in found[f"{i}#{j}"]) == 4


def test_the_next_output_brings_them_where_the_first_fails(make_engine: MakeEngine) -> None:
    engine = make_engine(overlap=True)
    engine.scheduler.max_scored_tokens = 5
    prompt = [*range(3, 40)]
    params = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=TOP, n=3)
    engine.add_request(prompt, params, request_id="0")
    for _ in range(3):
        engine.step()
    engine._finish(engine.scheduler.running[0], FinishReason.ERROR, "made up")
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    check([output for output in outputs if output.index == 1], prompt)
    ends = {output.index: output.finish_reason for output in outputs if output.finish_reason}
    assert ends == {0: FinishReason.ERROR, 1: FinishReason.LENGTH, 2: FinishReason.LENGTH}


def test_the_likeliest_need_not_be_asked_for(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompts = make_prompts(2)
    with_top = ask(engine, prompts)
    without = ask(engine, prompts, prompt_logprobs=0)
    for name, outputs in without.items():
        pairs = zip(outputs[0].prompt_logprobs, with_top[name][0].prompt_logprobs, strict=True)
        for one, other in pairs:
            assert one.top == () and (one.token_id, one.rank) == (other.token_id, other.rank)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_they_need_no_token_to_be_generated(make_engine: MakeEngine) -> None:
    engine = make_engine(overlap=True)
    prompts = [*make_prompts(3), [5]]
    found = ask(engine, prompts, max_tokens=0)
    for i, prompt in enumerate(prompts):
        [output] = found[f"{i}#0"]
        check([output], prompt)
        assert (output.token_ids, output.text) == ((), "")
        assert output.finish_reason is not None and output.finish_reason.value == "length"
    assert engine.metrics.output_tokens == 0
    assert engine.kv.pool.num_held == 0


def test_beside_others_nothing_changes(make_engine: MakeEngine) -> None:
    engine = make_engine(overlap=True, max_num_batched_tokens=48)
    prompts = make_prompts()
    engine.scheduler.max_scored_tokens = 5
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    for i, prompt in enumerate(prompts[:4]):
        engine.add_request(prompt, params, request_id=f"plain-{i}")
    found = ask(engine, prompts[4:])
    for i, prompt in enumerate(prompts[4:]):
        check(found[f"{i}#0"], prompt)
    expected = reference("llama", prompts[:4])
    for i in range(4):
        assert [t for o in found[f"plain-{i}#0"] for t in o.token_ids] == expected[i]


def test_logits_of_a_long_prompt_are_never_there_at_once(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert most_scored_rows(128_256, 2, "cuda") < 400 and most_scored_rows(128_256, 4, "cpu") < 100
    assert most_scored_rows(10**9, 4, "cpu") == 16
    monkeypatch.setattr(logprobs, "_GROUP_LOGITS", 256 * 4)
    engine = make_engine()
    engine.scheduler.max_scored_tokens = 10
    shapes = []
    forward = engine.executor.runner.forward

    def spy(*args: Any) -> torch.Tensor:
        logits = forward(*args)
        shapes.append(len(logits))
        return logits

    monkeypatch.setattr(engine.executor.runner, "forward", spy)
    prompt = [*range(3, 90)]
    check(ask(engine, [prompt])["0#0"], prompt)
    assert max(shapes) <= 11 and sum(shapes) == 86 + 4


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_on_a_gpu_beside_recorded_steps(
    family: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    engine = make_engine(family, device="cuda", max_num_batched_tokens=32)
    engine.scheduler.max_scored_tokens = 7
    prompts = make_prompts()
    expected = reference(family, prompts, max_tokens=8, device="cuda")
    for _ in range(2):
        found = ask(engine, prompts, max_tokens=8)
        for i, prompt in enumerate(prompts):
            check(found[f"{i}#0"], prompt, family, "cuda")
            assert [t for output in found[f"{i}#0"] for t in output.token_ids] == expected[i]
