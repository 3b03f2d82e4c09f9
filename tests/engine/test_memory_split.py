"""One budget for KV and experts: what it becomes, what it says, and what it refuses."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import reference, run
from tiny_models import make_model

from hotset.cost.hardware import choose_hardware
from hotset.cost.slot_bytes import SlotBytes
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.errors import ConfigError
from hotset.executor.probe import inspect_model, weights_bytes
from hotset.expert_options import HostedExperts, SplitMemory
from hotset.experts.sizes import slot_bytes_of
from hotset.experts.weights import Resident, experts_bytes, experts_layers
from hotset.model.loaded import LoadedModel
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.units import GIB

PROMPTS = [[5, 9, 13, 200, 7], [31] * 20, [77, 3, 250]]
FAMILY = "qwen3_moe"  # 8 experts, top-3
MIB_IN_GIB = 1 / 1024


def loaded(family: str = FAMILY) -> LoadedModel:
    return LoadedModel(make_model(family), None, family, family, (2,), 512)


@contextmanager
def engine(
    family: str = FAMILY,
    model: LoadedModel | None = None,
    overlap: bool | None = None,
    **options: Any,
) -> Iterator[Engine]:
    options = {"max_model_len": 96, "block_size": 4, "max_num_seqs": 16, **options}
    made = build_engine(Options.of(**options), model or loaded(family), overlap=overlap)
    try:
        yield made
    finally:
        made.close()


def slots(family: str = FAMILY, plan: Any = "auto") -> SlotBytes:
    found = slot_bytes_of(make_model(family), HostedExperts(expert_plan=plan))
    assert found is not None
    return found


def kv_bytes(made: Engine) -> int:
    return made.sizes.device_blocks * made.sizes.block_bytes


def taken_bytes(made: Engine) -> int:
    sizes = made.sizes
    return sizes.weights_bytes + sizes.expert_bytes + sizes.workspace_bytes + kv_bytes(made)


@pytest.mark.parametrize("plan", ["auto", "cache", "stream"])
@pytest.mark.parametrize("target", ["throughput", "latency"])
def test_one_budget_is_enough_and_the_answers_are_the_same(plan: str, target: str) -> None:
    # A third of the experts' bytes: some of them must go.
    sizes = slots(plan=plan)
    hot_bytes = sizes(sizes.num_experts) // 3 + sizes(sizes.fewest)
    with engine(hot_gib=hot_bytes / GIB, expert_plan=plan, target=target) as made:
        num_slots = made.sizes.experts.num_slots
        assert num_slots is not None and sizes.fewest <= num_slots < sizes.num_experts
        used = sizes(num_slots) + kv_bytes(made)
        assert hot_bytes - made.sizes.block_bytes < used <= hot_bytes
        assert f"{num_slots} of 8 experts a layer" in made.report
        assert f"split for {target}" in made.report
        assert run(made, PROMPTS) == reference(FAMILY, PROMPTS)


@pytest.mark.parametrize(
    "options", [{"expert_cold_dtype": "fp8"}, {"expert_cold_dtype": "int4"}, {"expert_prefetch": 3}]
)
def test_what_says_how_experts_come_goes_with_a_budget(options: dict[str, Any]) -> None:
    sizes = slots(plan="cache")
    config = {"hot_gib": sizes(5) / GIB, "expert_plan": "cache", "expected_users": 2, **options}
    with engine(**config) as made:
        num_slots = made.sizes.experts.num_slots
        assert num_slots is not None and options.get("expert_prefetch", 1) <= num_slots < 8
        answers = run(made, PROMPTS)
    with engine(hot_gib=0.01, expert_plan="cache", expert_slots=7, **options) as made:
        assert run(made, PROMPTS) == answers


def test_a_queue_gets_more_kv_than_one_user_who_gets_more_experts() -> None:
    sizes = slots(plan="cache")
    options = {"hot_gib": sizes(5) / GIB, "expert_plan": "cache"}
    with engine(**options, max_num_seqs=64) as queue, engine(**options, expected_users=1) as one:
        assert kv_bytes(queue) > kv_bytes(one)
        assert queue.sizes.experts.num_slots < one.sizes.experts.num_slots


def test_what_was_asked_stays_as_it_is_and_what_was_solved_is_beside_it() -> None:
    sizes = slots()
    asked = Options.of(
        hot_gib=sizes(5) / GIB,
        target="latency",
        expected_users=2,
        max_model_len=96,
        max_num_seqs=16,
    )
    made = build_engine(asked, loaded())
    try:
        assert made.options is asked
        assert isinstance(asked.experts, SplitMemory)
        assert made.sizes.experts is not None
        assert made.sizes.experts.num_slots == made.experts.num_slots
    finally:
        made.close()


def test_a_budget_for_everything_leaves_all_experts_where_they_were() -> None:
    sizes = slots()
    model = loaded()
    experts = experts_layers(model.model)[0]
    options = {"hot_gib": (sizes(sizes.num_experts) + 2 * 2**20) / GIB, "max_num_seqs": 4}
    with engine(model=model, **options) as made:
        assert "nothing is buffered" in made.report and "8 of 8 experts a layer" in made.report
        assert experts.hosted is None
        assert kv_bytes(made) >= 4 * 24 * made.sizes.block_bytes
        assert run(made, PROMPTS) == reference(FAMILY, PROMPTS)
    # Another engine over the same model, whose experts are packed by now.
    with engine(model=model, **options) as made:
        assert run(made, PROMPTS) == reference(FAMILY, PROMPTS)
    with (
        pytest.raises(ConfigError, match="another engine has packed all of them"),
        engine(model=model, hot_gib=sizes(sizes.num_experts) * 0.9 / GIB),
    ):
        pass


def test_the_total_covers_weights_experts_kv_and_workspace() -> None:
    model = loaded()
    dense_bytes = weights_bytes(model.model) - experts_bytes(model.model)
    assert dense_bytes == sum(
        p.nbytes for n, p in model.model.named_parameters() if ".experts." not in n
    )
    total_gib = (dense_bytes + 4 * 2**20) / GIB
    with engine(model=model, total_gib=total_gib, max_num_batched_tokens=256) as made:
        used = taken_bytes(made)
        assert used <= total_gib * GIB < used + made.sizes.block_bytes
    with engine(total_gib=total_gib, expert_slots=3, max_num_batched_tokens=256) as made:
        used = taken_bytes(made)
        assert used <= total_gib * GIB < used + made.sizes.block_bytes
        assert "split" not in made.report


def test_a_dense_model_has_a_total_too() -> None:
    model = loaded("llama")
    total_gib = (weights_bytes(model.model) + 4 * 2**20) / GIB
    with engine(model=model, total_gib=total_gib, max_num_batched_tokens=256) as made:
        used = taken_bytes(made)
        assert used <= total_gib * GIB < used + made.sizes.block_bytes
        assert "split" not in made.report


def test_experts_with_a_size_of_their_own_leave_the_budget_to_kv() -> None:
    with engine(hot_gib=MIB_IN_GIB, expert_slots=3) as made:
        assert 2**20 - made.sizes.block_bytes < kv_bytes(made) <= 2**20
        assert "split" not in made.report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hot_gib": 1e-5}, "give at least .* GiB more"),
        ({"total_gib": 1e-5}, "total_gib is 1e-05, but what is not split takes"),
        ({"hot_gib": 1e6}, "more than the .* free on the cpu"),
        ({"hot_gib": 0.1, "expected_prompt_tokens": 400}, "longest context is 96"),
        ({"hot_gib": 0.1, "total_gib": 0.1}, "give one of them"),
        ({"target": "latency"}, "target is 'latency', which does nothing without memory to split"),
        (
            {"hot_gib": 0.1, "expert_slots": 2, "expected_users": 3},
            "expected_users is 3, which does nothing",
        ),
        ({"hot_gib": 0.1, "expected_users": 0}, "expected_users is 0; expected 1 or more"),
        ({"total_gib": 0.0}, "total_gib is 0.0; expected a size above 0 GiB"),
        ({"target": "both", "hot_gib": 1.0}, "expected throughput or latency"),
    ],
)
def test_budgets_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message), engine(**options):
        pass


@pytest.mark.parametrize(
    "option", [{"target": "latency"}, {"expected_users": 2}, {"expert_plan": "stream"}]
)
def test_options_of_experts_are_refused_for_a_dense_model(option: dict[str, Any]) -> None:
    [name] = option
    refusal = f"{name} is .* but LlamaForCausalLM has no experts"
    with pytest.raises(ConfigError, match=refusal), engine("llama", hot_gib=0.1, **option):
        pass


def test_a_split_of_blocks_in_two_parts_stays_where_it_is() -> None:
    with (
        pytest.raises(ConfigError, match="move_split lends whole blocks"),
        engine("deepseek_v32", hot_gib=MIB_IN_GIB, move_split=True),
    ):
        pass


def test_nothing_is_predicted_by_the_rates_of_other_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = tmp_path / "hardware.json"
    monkeypatch.setattr("hotset.cost.hardware.probe_path", lambda: measured)
    budget = {"hot_gib": slots()(4) / GIB}
    with engine(**budget) as made:
        assert "no prediction: the rates of this CPU are not known; 'hotset probe'" in made.report
        assert "predicted" not in made.report and "tokens/s" not in made.report
    # A GPU's, as if the machine had got another one: still none of a CPU.
    profile = json.loads(resources.files("hotset.cost").joinpath("hardware/h200.json").read_text())
    measured.write_text(json.dumps(profile))
    with engine(**budget) as made:
        assert "no prediction" in made.report
    profile |= {"name": "this", "description": "a CPU, 2 threads", "measured": True}
    measured.write_text(json.dumps(profile))
    with engine(**budget) as made:
        assert "output tokens/s" in made.report and "by the rates of this" in made.report


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA T4", None),
        (None, None),
    ],
)
def test_only_a_known_gpu_has_bundled_rates(
    gpu: str | None, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotset.cost.hardware.probe_path", lambda: tmp_path / "none")
    found = choose_hardware(None, gpu)
    assert (found and found.name) == name


def test_a_small_enough_shortage_is_named_exactly() -> None:
    sizes = slots()
    with pytest.raises(ConfigError) as refused, engine(hot_gib=sizes(1) / GIB):
        pass
    more_gib = float(str(refused.value).split("give at least ")[1].split()[0])
    with engine(hot_gib=sizes(1) / GIB + more_gib) as made:
        assert made.sizes.device_blocks >= 24


def test_a_model_is_inspected_without_its_experts() -> None:
    one, other = make_model(FAMILY), make_model(FAMILY)
    for experts in experts_layers(other):
        for name in experts.names:
            weight = getattr(experts.module, name).to("meta")
            setattr(experts.module, name, torch.nn.Parameter(weight, requires_grad=False))
    assert inspect_model(one) == inspect_model(other)
    assert all(isinstance(experts.state, Resident) for experts in experts_layers(other))


def test_a_dense_checkpoint_is_loaded_as_ever_with_a_budget(tmp_path: Path) -> None:
    for family in ("llama", FAMILY):
        make_model(family).save_pretrained(tmp_path / family)
        model = load_model(str(tmp_path / family), device="cpu", dtype="auto", experts_on_host=True)
        with engine(model=replace(model, eos_token_ids=(2,)), hot_gib=0.01) as made:
            assert run(made, PROMPTS) == reference(family, PROMPTS)
