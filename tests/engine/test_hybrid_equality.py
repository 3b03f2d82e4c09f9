"""Models with a state beside KV answer as `generate` does, however their steps are cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import make_prompts, reference, run
from hybrid_prompts import KINDS
from tiny_models import HYBRID_FAMILIES, make_model

from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.errors import ConfigError
from hotset.kv.state_slots import StateSlots
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import SamplingParams

MakeEngine = Callable[..., Engine]
_ANSWERS: dict[str, list[list[int]]] = {}


def expected(family: str) -> list[list[int]]:
    if family not in _ANSWERS:
        _ANSWERS[family] = reference(family, make_prompts())
    return _ANSWERS[family]


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_each_family_answers_as_generate_does(family: str, make_engine: MakeEngine) -> None:
    engine = make_engine(family, max_num_batched_tokens=24)
    assert run(engine, make_prompts()) == expected(family)
    assert len({tuple(answer) for answer in expected(family)}) > 3
    assert engine.kv.states is not None and engine.kv.states.slots.pool.num_held == 0


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_chunks_do_not_matter(
    family: str, overlap: bool, chunk: int, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, max_num_batched_tokens=chunk, max_num_seqs=4, overlap=overlap)
    assert run(engine, make_prompts()) == expected(family)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_a_preempted_request_is_computed_again(
    family: str, overlap: bool, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, max_num_batched_tokens=48, overlap=overlap, prefix_caching=False)

    def preempt_one() -> None:
        if len(engine.scheduler.running) > 1:
            engine.scheduler._preempt_last()

    for _ in range(2):  # nothing of the first round is found in the second
        assert run(engine, make_prompts(), each_step=preempt_one) == expected(family)
    assert engine.metrics.preemptions > 10
    assert engine.metrics.recomputed_tokens > 0
    assert not engine.metrics.cached_tokens.total()


@pytest.mark.parametrize("family", KINDS)
def test_more_requests_than_slots_wait_for_one(family: str, make_engine: MakeEngine) -> None:
    engine = make_engine(family, max_num_seqs=2)
    assert engine.sizes.states is not None and engine.sizes.states.num_seqs == 2
    engine.scheduler.max_num_seqs = 6
    engine.kv.states.slots = StateSlots(2)
    assert run(engine, make_prompts()) == expected(family)


@pytest.mark.parametrize("family", KINDS)
def test_n_outputs_of_a_prompt_are_those_of_n_requests(
    family: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(family)
    outputs: dict[int, list[int]] = {0: [], 1: [], 2: []}
    engine.add_request(make_prompts()[1], SamplingParams(max_tokens=12, ignore_eos=True, n=3))
    while engine.has_work:
        for output in engine.step():
            outputs[output.index] += output.token_ids
    assert list(outputs.values()) == [expected(family)[1]] * 3


@pytest.mark.parametrize("family", KINDS)
def test_two_engines_run_one_model(family: str, make_engine: MakeEngine) -> None:
    one = make_engine(family)
    other = make_engine(family)
    prompts = make_prompts()
    for prompt in prompts[:3]:
        one.add_request(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    for _ in range(4):
        one.step()
    assert run(other, prompts) == expected(family)
    while one.has_work:
        one.step()
    assert run(one, prompts) == expected(family)


class _Failing(dict[int, torch.Tensor]):
    """Columns of convolutions; those of one layer are refused once."""

    fails_at: int | None = None

    def __getitem__(self, layer: int) -> torch.Tensor:
        if layer == self.fails_at:
            self.fails_at = None
            raise RuntimeError("out of memory")
        return super().__getitem__(layer)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layer", [0, 3])  # before and after others have gone on
@pytest.mark.parametrize("family", KINDS)
def test_after_a_step_that_failed_the_others_are_computed_again(
    family: str, layer: int, overlap: bool, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, overlap=overlap)
    arena: Any = engine.executor.runner._states
    arena.columns = columns = _Failing(arena.columns)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    ids = [engine.add_request(prompt, params) for prompt in make_prompts()[:3]]
    outputs: dict[str, list[int]] = {request_id: [] for request_id in ids}
    errors = {}
    for count in range(100):
        if not engine.has_work:
            break
        if count == 5:
            columns.fails_at = layer
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
            if output.error is not None:
                errors[output.request_id] = output.error
        engine.kv.check()
    assert list(errors) == ids[-1:] and "out of memory" in errors[ids[-1]]
    assert [outputs[request_id] for request_id in ids[:-1]] == expected(family)[:2]
    assert engine.metrics.recomputed_tokens > 0


@pytest.mark.parametrize("family", KINDS)
def test_the_state_of_another_prompt_changes_the_answer(
    family: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(family)
    changed = 0
    for prompt, answer in zip(make_prompts(), expected(family), strict=True):
        [other, own] = [
            engine.add_request(tokens, SamplingParams(max_tokens=12, ignore_eos=True))
            for tokens in ([token % 255 + 1 for token in prompt], prompt)
        ]
        outputs: dict[str, list[int]] = {other: [], own: []}
        planted = False
        while engine.has_work:
            for output in engine.step():
                outputs[output.request_id] += output.token_ids
            running = engine.scheduler.running
            if not planted and len(running) == 2 and all(r.num_output_tokens for r in running):
                one, two = (request.kv.state_read for request in running)
                arena: Any = engine.executor.runner._states
                for slots in (*arena.columns.values(), *arena.recurrent.values()):
                    slots[two] = slots[one]
                planted = True
        assert planted
        changed += sum(a != b for a, b in zip(outputs[own], answer, strict=True))
    assert changed > len(make_prompts()) * (1 if family == "lfm2" else 8)


def scores(engine: Engine, prompts: list[list[int]], *, preempts: bool = False) -> torch.Tensor:
    """Log-probabilities of all tokens of prompts but their first, prompt by prompt."""
    params = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=1)
    found = {engine.add_request(prompt, params): list[float]() for prompt in prompts}
    while engine.has_work:
        if preempts and len(engine.scheduler.running) > 1:
            engine.scheduler._preempt_last()
        for output in engine.step():
            found[output.request_id] += [one.logprob for one in output.prompt_logprobs]
    assert [len(each) for each in found.values()] == [len(prompt) - 1 for prompt in prompts]
    return torch.tensor([score for each in found.values() for score in each])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", KINDS)
def test_under_load_bfloat16_is_as_near_to_float32_as_alone(
    family: str, device: str, make_engine: MakeEngine
) -> None:
    prompts = [prompt for prompt in make_prompts() if len(prompt) > 1]
    changes = {"num_experts": 1} if family == "jamba" else {}  # roundings choose other experts
    exact = scores(make_engine(family, model_changes=changes), prompts)
    rounded = {"model_dtype": torch.bfloat16, "kv_bytes": 2, "device": device, "eager": True}
    engine = make_engine(family, model_changes=changes, **rounded)
    alone = torch.cat([scores(engine, [prompt]) for prompt in prompts])
    engine = make_engine(family, model_changes=changes, max_num_batched_tokens=24, **rounded)
    loaded = scores(engine, prompts, preempts=True)
    assert engine.metrics.preemptions > 4
    error = float((alone - exact).norm())
    assert 0 < error < 0.1 * float(exact.norm())
    assert float((loaded - exact).norm()) < 1.5 * error


def test_too_little_memory_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"no room for one request: its state takes .* give hot"):
        make_engine("bamba", hot_gib=1e-6)


def test_the_size_named_in_a_refusal_works(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError) as refused:
        make_engine("qwen3_5_text", hot_gib=1e-6)
    least = float(str(refused.value).split("give hot_gib ")[1].split()[0])
    engine = make_engine("qwen3_5_text", hot_gib=least)
    assert engine.sizes.states is not None and engine.sizes.states.num_seqs == 1
    assert run(engine, make_prompts()) == expected("qwen3_5_text")
    assert f"{engine.sizes.states.num_bytes / 2**30:>9.3f}" in engine.report
    assert "prefixes are found up to states" in engine.report


def test_state_shares_a_budget_with_experts_and_the_size_named_in_a_refusal_works() -> None:
    loaded = LoadedModel(make_model("qwen3_next"), None, "tiny", "tiny", (2,), 512)
    sizes = {"block_size": 4, "max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 24}
    with pytest.raises(ConfigError, match="no room for one request") as refused:
        build_engine(Options.of(total_gib=0.0011, **sizes), loaded)
    least = float(str(refused.value).split("give total_gib ")[1].split()[0])
    engine = build_engine(Options.of(total_gib=least, **sizes), loaded)
    assert engine.sizes.states is not None and engine.sizes.states.num_seqs == 1
    assert run(engine, make_prompts()) == expected("qwen3_next")
    engine.close()
    roomy = build_engine(Options.of(total_gib=2 * least, **sizes), loaded)
    assert roomy.sizes.states is not None and roomy.sizes.states.num_seqs == 4
    assert run(roomy, make_prompts()) == expected("qwen3_next")
    roomy.close()
