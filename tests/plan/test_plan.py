"""Plans: what is conserved, what is monotonic, and what is refused."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.cli.plan import command
from hotset.cli.plan_options import Options
from hotset.cost.calibration import Calibration
from hotset.cost.catalog import bundled_models, load_model
from hotset.cost.hardware import bundled_hardware, hardware_from_json, load_hardware
from hotset.cost.layout import candidate_layouts, shard_model
from hotset.cost.routing import Routing
from hotset.cost.step_time import CostModel, Tiering
from hotset.errors import PlanError
from hotset.layout import Layout, parse_layout
from hotset.plan.compare import compare_plans, rate_at
from hotset.plan.planner import make_plan
from hotset.plan.result import Plan
from hotset.plan.workload import Request, Workload


def plan(
    model: str = "llama-3-8b",
    hardware: str = "h100-sxm",
    layout: str | None = None,
    *,
    link: str | None = None,
    host_gb: float | None = None,
    hbm_gb: float | None = None,
    **load: Any,
) -> Plan:
    chips = load_hardware(hardware)
    if link:
        chips = chips.with_link(link)
    hbm_bytes = chips.hbm_bytes if hbm_gb is None else hbm_gb * 1e9
    host_bytes = chips.host_bytes if host_gb is None else host_gb * 1e9
    chips = replace(chips, hbm_bytes=hbm_bytes, host_bytes=host_bytes, disk_bytes=0.0)
    return make_plan(
        Request(
            load_model(model),
            chips,
            Workload(**load),
            parse_layout(layout) if layout else None,
            host_given=host_gb is not None,
        )
    )


MODELS = st.sampled_from(bundled_models())
CASES = st.tuples(
    MODELS,
    st.sampled_from(bundled_hardware()),
    st.integers(1, 2000),
    st.integers(300, 200_000),
    st.sampled_from([None, 256]),
    st.integers(1, 3),
)


def made(case: tuple[Any, ...], **more: Any) -> Plan | None:
    model, hardware, users, context, output, turns = case
    if output and output * turns >= context:
        return None
    load = {"users": users, "context": context, "output": output, "turns": turns, **more}
    try:
        return plan(model, hardware, **load)
    except PlanError:
        return None


@given(CASES)
@settings(max_examples=60, deadline=None)
def test_parts_sum_to_the_whole(case: tuple[Any, ...]) -> None:
    found = made(case)
    if found is None:
        return
    data: Any = found.as_dict()
    assert sum(data["step"]["parts"].values()) == pytest.approx(data["step"]["expected_s"])
    inside = data["resident"]
    held = sum(value for name, value in inside.items() if name.endswith("_bytes"))
    assert held == pytest.approx(data["hbm_bytes"])
    assert inside["free_bytes"] >= -1
    assert data["step"]["ceiling_s"] <= data["step"]["expected_s"] * (1 + 1e-9)
    assert all(value >= 0 for value in data["step"]["parts"].values())
    assert data["users_running"] <= data["users"]
    assert data["users_resident"] <= data["users_total"]
    assert data["band"]["low"] <= data["tokens_per_s"] <= data["band"]["high"] * (1 + 1e-9)
    assert data["tpot_s"] > 0 and data["ttft_s"] > 0
    json.dumps(data, allow_nan=False)


@given(CASES, st.integers(1, 1000))
@settings(max_examples=40, deadline=None)
def test_more_users_never_lower_total_kv(case: tuple[Any, ...], more: int) -> None:
    few, many = made(case), made((*case[:2], case[2] + more, *case[3:]))
    if few and many and few.layout == many.layout:
        assert many.as_dict()["kv_bytes_total"] > few.as_dict()["kv_bytes_total"]  # type: ignore[operator]
        assert many.resident_kv_bytes + many.host_kv_bytes + many.disk_kv_bytes >= (
            few.resident_kv_bytes * 0.999
        )


@pytest.mark.parametrize(
    ("hardware", "users", "context"),
    [("a100-80gb", 398, 2000), ("gh200", 421, 2000), ("l40s", 120, 2000), ("h200", 269, 2000)],
)
def test_one_user_more_than_fit_leaves_the_others_where_they_are(
    hardware: str, users: int, context: int
) -> None:
    all_fit, one_more = (
        plan("deepseek-v3", hardware, users=n, context=context) for n in (users, users + 1)
    )
    assert (all_fit.users_resident, one_more.users_resident) == (users, users)
    assert one_more.resident_kv_bytes == pytest.approx(all_fit.resident_kv_bytes)
    assert one_more.host_kv_bytes > 0


@given(CASES, st.floats(1, 500), st.floats(1, 10))
@settings(max_examples=40, deadline=None)
def test_faster_link_never_lowers_tokens_per_s(
    case: tuple[Any, ...], slow: float, factor: float
) -> None:
    before, after = made(case, link=f"{slow}"), made(case, link=f"{slow * factor}")
    if before and after:
        assert after.tokens_per_s >= before.tokens_per_s * (1 - 1e-9)


@given(st.integers(1, 512), st.sampled_from(["qwen3-30b-a3b", "mixtral-8x7b"]))
@settings(max_examples=20, deadline=None)
def test_split_of_hbm_is_at_least_as_fast_as_any_fixed_one(users: int, model: str) -> None:
    shape, chips = load_model(model), load_hardware("h100-sxm")
    chips = replace(chips, hbm_bytes=40e9, host_bytes=400e9)
    base = Request(shape, chips, Workload(users=users), Layout(), host_given=True)
    best = make_plan(base).tokens_per_s
    for resident in range(0, shape.num_experts + 1, max(1, shape.num_experts // 8)):
        try:
            fixed = make_plan(replace(base, expert_slots=resident))
        except PlanError:
            continue
        assert fixed.tokens_per_s <= best * 1.04  # the grid of users is 3 % apart


def test_kv_gets_hbm_first_for_many_users_and_experts_do_for_one() -> None:
    many = plan("qwen3-30b-a3b", "h200", hbm_gb=40, host_gb=100, users=256, context=1024)
    one = plan("qwen3-30b-a3b", "h200", hbm_gb=40, host_gb=100, users=1, context=1024)
    assert many.resident_kv_bytes > 10 * one.resident_kv_bytes
    assert one.resident_expert_share > 2 * many.resident_expert_share
    # At 256 users a step reaches all experts, and what is not resident is streamed.
    assert many.cost.expert_slots_read(256) == pytest.approx(128, rel=1e-4)
    assert many.causes[0][0] in ("experts over the host link", "HBM capacity")


def test_distinct_experts_are_those_of_the_table() -> None:
    table = {
        "deepseek-v3": (57, 102, 163, 222, 252, 256),
        "qwen3-235b-a22b": (52, 82, 112, 126, 128, 128),
    }
    for model, counts in table.items():
        shape = load_model(model)
        for tokens, count in zip((8, 16, 32, 64, 128, 256), counts, strict=True):
            found = Routing().distinct(shape.num_experts, shape.top_k_experts, tokens)
            assert round(found) == count


def test_skewed_routing_reaches_fewer_experts_and_loads_one_rank_more() -> None:
    skewed = Routing(tuple(s / sum(range(1, 65)) for s in range(1, 65)))
    assert skewed.distinct(64, 8, 8) < Routing().distinct(64, 8, 8)
    assert skewed.imbalance(64, 8) > 1.5
    assert Routing().imbalance(64, 8) == 1


def test_attention_dp_holds_each_latent_once_and_so_more_users() -> None:
    tp, dp = (
        plan("deepseek-v3", "h200", layout, users=256, context=8192)
        for layout in ("tp=8", "dp=8,ep=8")
    )
    assert (tp.kv_copies, dp.kv_copies) == (8, 1)
    assert 3.5 < dp.users_resident / tp.users_resident < 5
    [ratio] = compare_plans(["tp", "dp"], [tp, dp])
    assert ratio.tokens_per_s_per_gpu == pytest.approx(ratio.capacity * ratio.speed)
    assert ratio.capacity > 2 > ratio.speed


def test_expert_parallelism_is_not_always_preferred() -> None:
    few = {
        layout: plan("qwen3-30b-a3b", "h200", layout, users=8, context=1024)
        for layout in ("tp=4", "dp=4,ep=4")
    }
    assert few["tp=4"].tokens_per_s > few["dp=4,ep=4"].tokens_per_s


def test_mla_of_all_heads_is_bound_by_compute_on_an_h200_and_of_few_by_memory() -> None:
    dp = plan("deepseek-v3", "h200", "dp=8,ep=8", users=256, context=8192)
    tp = plan("deepseek-v3", "h200", "tp=8", users=64, context=8192)
    assert dp.step.bounds["attention"] == "compute"
    assert tp.step.bounds["attention"] == "HBM bandwidth"


def test_link_rates_are_one_way() -> None:
    assert load_hardware("gh200").host_link_bytes_per_s == 450e9
    assert load_hardware("h100-sxm").host_link_bytes_per_s == 64e9


def test_link_is_capped_by_the_memory_of_the_host_and_by_who_shares_it() -> None:
    shape = load_model("llama-3-8b")

    def rate(name: str, gpus: int) -> float:
        chips = load_hardware(name)
        cost = CostModel(shape, chips, Layout(1, gpus), "bf16", Calibration(), Routing())
        return cost.link_bytes_per_s()

    assert rate("gb200", 1) == pytest.approx(450e9 * 0.86)
    assert rate("gb200", 2) == pytest.approx(256e9)  # two GPUs on one Grace
    assert rate("a100-80gb", 8) == pytest.approx(32e9 / 2 * 0.86)  # two behind one uplink


def test_streaming_kv_each_step_pays_on_c2c_and_not_on_pcie() -> None:
    chips = load_hardware("gh200")
    shape = load_model("llama-3-8b")
    rates = {}
    for link in ("c2c", "pcie5"):
        cost = CostModel(shape, chips.with_link(link), Layout(), "bf16", Calibration(), Routing())
        step = cost.decode(64, 32_768, Tiering(host_kv=0.5))
        rates[link] = 64 / step.expected_s
    assert rates["c2c"] > 4 * rates["pcie5"]


def test_reuse_lowers_ttft_only_as_far_as_the_link_allows() -> None:
    none = plan(users=8, context=8192, output=128)
    slow = plan(users=8, context=8192, output=128, reuse=0.9, link="1")
    fast = plan(users=8, context=8192, output=128, reuse=0.9)
    assert fast.turn.ttft_s < 0.4 * none.turn.ttft_s
    assert none.turn.ttft_s >= slow.turn.ttft_s > fast.turn.ttft_s
    assert slow.turn.recomputed > fast.turn.recomputed


def test_without_a_tier_below_the_past_of_waiting_users_is_lost() -> None:
    load = {"users": 256, "context": 8192, "output": 128, "turns": 4}
    without, with_host = plan(host_gb=0, **load), plan(host_gb=1000, **load)
    assert without.users_total == without.users_resident
    assert with_host.turn.found > 2 * without.turn.found
    assert with_host.tokens_per_s > without.tokens_per_s


def test_rate_at_its_own_users_is_that_of_the_plan() -> None:
    found = plan(users=32, context=2048, output=128)
    assert rate_at(found, 32) == found.tokens_per_s
    assert rate_at(found, 32 * (1 - 1e-9)) == pytest.approx(found.tokens_per_s, rel=1e-3)


def test_every_figure_of_every_profile_names_its_source() -> None:
    for name in bundled_hardware():
        chips = load_hardware(name)
        assert len(chips.sources) >= 14 and all(chips.sources.values())
    with pytest.raises(PlanError, match="names no source"):
        hardware_from_json({"figures": {"hbm_gb": {"value": 80, "source": " "}}}, "mine")
    with pytest.raises(PlanError, match="lacks"):
        hardware_from_json({"figures": {}}, "mine")


def test_layouts_shard_all_weights_and_no_more_than_they_must() -> None:
    shape = load_model("qwen3-30b-a3b")
    for layout in candidate_layouts(shape, 8):
        shard = shard_model(shape, layout)
        held = shard.dense_bytes * layout.gpus + shard.experts_bytes * layout.gpus
        assert held >= shape.weights_bytes
        copies = layout.gpus / layout.expert_gpus
        assert shard.experts_bytes * layout.gpus == pytest.approx(shape.experts_bytes * copies)


def test_uneven_expert_parallelism_adds_spare_slots() -> None:
    shard = shard_model(load_model("deepseek-v3"), parse_layout("ep=72"))
    assert shard.expert_slots == 4  # 288 slots for 256 experts


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llama-9"], "near it: llama"),
        (["llama-3-8b", "--example", "moe-7.8x"], "--example takes no MODEL"),
        (["llama-3-8b", "--hardware", "h100-xsm"], "near it: h100-sxm"),
        (["llama-3-8b", "--layout", "tp=3"], "does not divide the 32 attention heads"),
        (["llama-3-8b", "--gpus", "4", "--layout", "tp=8"], "needs 8 GPUs and 4 are given"),
        (["llama-3-8b", "--layout", "ep=8"], "has none"),
        (["qwen3-30b-a3b", "--layout", "tp=4,dp=2,ep=6"], "must be a multiple of tp=4"),
        (["llama-3-8b", "--layout", "pp=2"], "pp, which is not planned"),
        (["llama-3-8b", "--layout", "tp"], "expected for example"),
        (["llama-3-8b", "--users", "0"], "--users is '0'"),
        (["llama-3-8b", "--users", "-4"], "--users is '-4'"),
        (["llama-3-8b", "--max-model-len", "lots"], "--max-model-len is 'lots'"),
        (["llama-3-8b", "--output-tokens", "4k"], "leaves no prompt"),
        (["llama-3-8b", "--reuse", "1.5"], "--reuse is 1.5"),
        (["llama-3-8b", "--reuse", "nan"], "--reuse is nan"),
        (["llama-3-8b", "--turns", "0"], "--turns is 0"),
        (["llama-3-8b", "--output-tokens", "0"], "--output-tokens is '0'"),
        (["llama-3-8b", "--gpus", "0"], "--gpus is 0"),
        (["llama-3-8b", "--total-gib", "-1"], "--total-gib is -1"),
        (["llama-3-8b", "--total-gib", "75"], "at most the 74.51 GiB of h100-sxm"),
        (["llama-3-8b", "--hot-gib", "70"], "--hot-gib is 70, and 57.5 GiB"),
        (["llama-3-8b", "--hot-gib", "7", "--total-gib", "40"], "give one of them"),
        (["llama-3-8b", "--host-gib", "inf"], "--host-gib is inf"),
        (["llama-3-8b", "--host-gib", "-1"], "--host-gib is -1"),
        (["llama-3-8b", "--kv-dtype", "fp3"], "--kv-dtype is 'fp3'; expected one of auto, fp8"),
        (["llama-3-8b", "--kv-dtype", "fp8_ds_mla"], "for MLA only"),
        (["llama-3-8b", "--dtype", "fp3"], "--dtype is 'fp3'; expected one of auto, float32"),
        (["llama-3-8b", "--link", "rope"], "link 'rope' is unknown"),
        (["llama-3-8b", "--expert-slots", "4"], "has no experts"),
        (["olmoe-1b-7b", "--expert-slots", "65"], "expected 0 to 64"),
        (["llama-3.1-405b", "--hardware", "rtx-4090"], "do not fit"),
        (["llama-3-70b", "--gpus", "1"], "do not fit"),
        (["llama-3-8b", "--gpus", "1", "--max-model-len", "8m"], "does not fit"),
        (["deepseek-v3", "--gpus", "8", "--host-gib", "0", "--disk-gib", "0"], "does not fit"),
        (["llama-3-8b", "--sweep", "time=1:2"], "expected users=1:1024"),
        (["llama-3-8b", "--sweep", "users=8:2"], "8 is above 2"),
        (["llama-3-8b", "--find", "fast"], "expected for example ttft"),
        (["llama-3-8b", "--find", "tpot=1us"], "expected for example ttft"),
        (["llama-3-8b", "--find", "tpot=0.1ms"], "no layout meets"),
        (["llama-3-8b", "--compare", "speed=4"], "is not a part of a case"),
        (["llama-3-8b", "--overlap", "all"], "--overlap is 'all'"),
        (["llama-3-8b", "--engine", "mine"], "--engine is 'mine'"),
        (["llama-3-8b", "--expert-histogram", "/none.json"], "cannot be read"),
        (["llama-3-8b", "--explain", "--json"], "--explain goes with a single case"),
        ([], "no MODEL given"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, PlanError), result.output
    message = str(result.exception)
    assert words in message and "\n" not in message


KEYS = """model.total_params model.active_params weights_bytes expert_bytes_each experts_bytes
kv_bytes_per_token kv_bytes_per_user kv_bytes_total kv_copies hbm_bytes resident.weights_bytes
resident.experts_bytes resident.kv_bytes users_resident users_total step.ceiling_s step.expected_s
step.parts bottleneck runner_up tokens_per_s tokens_per_s_per_gpu tpot_s ttft_s
band.low band.high"""


def test_json_is_one_object_with_the_promised_keys() -> None:
    data = json.loads(run("olmoe-1b-7b", "--users", "16", "--json").output)
    for key in KEYS.split():
        value = data
        for name in key.split("."):
            value = value[name]
        assert value is not None
    assert data["kv_bytes_total"] == 16 * data["kv_bytes_per_user"]


def test_comparison_splits_each_ratio() -> None:
    arguments = ["deepseek-v3", "--hardware", "h200", "--max-model-len", "8k", "--json"]
    data = json.loads(run(*arguments, "--compare", "tp=8; dp=8,ep=8").output)
    assert [case["layout"] for case in data["cases"]] == ["tp=8", "dp=8,ep=8"]
    [ratio] = data["ratios"]
    rates = [case["tokens_per_s_per_gpu"] for case in data["cases"]]
    assert ratio["tokens_per_s_per_gpu"] == pytest.approx(rates[1] / rates[0])
    assert ratio["capacity"] * ratio["speed"] == pytest.approx(rates[1] / rates[0])


def test_links_and_tier_sizes_compare_too() -> None:
    base = ["qwen3-235b-a22b", "--hardware", "h200", "--gpus", "2", "--users", "4", "--json"]
    links = json.loads(run(*base, "--compare", "pcie5", "--compare", "c2c").output)
    assert links["ratios"][0]["speed"] > 1.5
    sizes = json.loads(run("llama-3-8b", "--json", "--compare", "host-gib=0; host-gib=500").output)
    totals = [case["users_total"] for case in sizes["cases"]]
    assert totals[1] > totals[0]


def test_sweep_doubles_from_the_first_value_to_the_last() -> None:
    data = json.loads(run("llama-3-8b", "--sweep", "max-model-len=1k:100k", "--json").output)
    contexts = [case["context"] for case in data["cases"]]
    assert contexts[0] == 1024 and contexts[-1] == 102_400
    kv = [case["kv_bytes_per_user"] for case in data["cases"]]
    assert all(a < b for a, b in itertools.pairwise(kv))
    assert "tokens/s against context" in run("llama-3-8b", "--sweep", "max-model-len=1k:4k").output


def test_search_keeps_the_target_and_serves_the_most_users() -> None:
    arguments = ["llama-3-8b", "--gpus", "2", "--users", "512", "--find", "tpot=20ms"]
    data = json.loads(run(*arguments, "--json").output)
    assert data["tpot_s"] <= 0.020
    assert data["users_served"] == max(case["users_served"] for case in data["cases"])
    assert "best first" in run(*arguments).output


def test_a_plan_of_latents_counts_what_the_engine_stores() -> None:
    ours = Options(model="deepseek-v3", layout="dp=8,ep=8", users="256").request()
    published = Options(
        model="deepseek-v3", layout="dp=8,ep=8", users="256", engine="published"
    ).request()
    assert ours.shape.layers == published.shape.layers
    assert ours.shape.stored.kv_bytes_per_token("bf16") == 70_272
