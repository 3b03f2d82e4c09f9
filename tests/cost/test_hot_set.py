"""Hot requests on one H200: bytes, steps and users of the two shapes of the bench's preset."""

import json
from dataclasses import replace
from importlib import resources

import pytest

from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.families import shape_from_config
from hotset.cost.hardware import load_hardware
from hotset.cost.hot_plan import HotPlan, plan_hot_set
from hotset.cost.hot_set import HotSetCost, Room, SparseCache, fetches
from hotset.cost.routing import Routing
from hotset.cost.selection import DrawnSelections
from hotset.cost.shape import ModelShape
from hotset.cost.step_time import CostModel
from hotset.layout import Layout

CONTEXT = 33_792
GLM_5_2 = (1, 1, *[4] * 19)  # layers by the indexer that selects for them
GIB = 2**30


def shape_of(name: str) -> ModelShape:
    text = (resources.files("hotset.bench") / "shapes" / f"{name}.json").read_text()
    return replace(shape_from_config(json.loads(text), name), index_dtype="fp8")


def hot_cost(
    name: str = "dsa-8l",
    overlap: float = 0.4,
    *,
    prefetch: int = 0,
    link_gb_per_s: float | None = 50,
) -> HotSetCost:
    shape = shape_of(name)
    cost = CostModel(
        shape, load_hardware("h200"), Layout(), "bf16", CALIBRATIONS["hotset"], Routing()
    )
    cache = SparseCache.of(shape, "bf16")
    assert cache is not None
    link = None if link_gb_per_s is None else link_gb_per_s * 1e9
    return HotSetCost(cost, cache, DrawnSelections(overlap), CONTEXT, link, prefetch)


def planned(cost: HotSetCost, *, gib: float = 6, slots: int | None = 4096) -> HotPlan:
    plan = plan_hot_set(cost, Room(gib * GIB, 64 * GIB), 256, slots=slots)
    assert plan is not None and plan.resident is not None
    return plan


def test_a_model_of_eight_layers_has_the_bytes_of_its_config() -> None:
    shape = shape_of("dsa-8l")
    assert round(shape.total_params / 1e9, 2) == 60.52
    assert round(shape.weights_bytes / 1e9, 1) == 121.0
    assert SparseCache.of(shape, "bf16") == SparseCache((1,) * 8, 1152, 8 * 132, 2048)
    shared = SparseCache.of(shape_of("dsa-8l-shared"), "bf16")
    assert shared == SparseCache((4, 4), 1152, 264, 2048)
    assert shape.kv_bytes_per_token("bf16") == 10_272


def test_bytes_of_resident_and_hot_requests() -> None:
    cache = SparseCache((1,) * 61, 1152, 61 * 132, 2048)  # DeepSeek-V3.2
    assert round(cache.resident_bytes(36_864) / 1e9, 2) == 2.89
    assert round(cache.hot_bytes(36_864, 4096) / 1e9, 2) == 0.62
    glm = SparseCache(GLM_5_2, 1152, 21 * 132, 2048)  # GLM-5.2
    assert round(glm.resident_bytes(36_864) / 1e9, 2) == 3.41
    assert round(glm.hot_bytes(36_864, 4096) / 1e9, 2) == 0.49
    assert (glm.num_layers, glm.index_layers) == (78, 21)


@pytest.mark.parametrize(
    ("overlap", "slots", "users", "step_ms", "link_ms", "gain"),
    [
        (0.40, 4096, 79, 42.7, 10.3, 2.91),
        (0.40, 3072, 89, 47.9, 15.3, 2.92),
        (0.40, 6144, 63, 36.7, 4.65, 2.70),
        (0.35, 4096, 79, 44.7, 12.2, 2.78),
        (0.50, 4096, 79, 39.1, 6.71, 3.17),
    ],
)
def test_steps_of_hot_requests(
    overlap: float, slots: int, users: int, step_ms: float, link_ms: float, gain: float
) -> None:
    plan = planned(hot_cost(overlap=overlap), slots=slots)
    assert plan.resident is not None
    assert (plan.resident.users, plan.hot.users, plan.hot.num_hot) == (18, users, users - 1)
    assert plan.limit == "HBM"
    assert plan.resident.seconds == pytest.approx(28.3e-3, rel=0.01)
    assert plan.hot.seconds == pytest.approx(step_ms / 1e3, rel=0.015)
    assert plan.hot.link_s == pytest.approx(link_ms / 1e3, rel=0.01)
    assert plan.gain == pytest.approx(gain, rel=0.015)


def test_the_headline_case_line_by_line() -> None:
    plan = planned(hot_cost())
    assert round(plan.rows.missed) == 716
    assert plan.host_bytes == pytest.approx(78 * 33_792 * 10_272)
    assert plan.hot.missed_bytes == pytest.approx(0.514e9, rel=0.01)
    assert plan.hot.chip_s == pytest.approx(32.4e-3, rel=0.015)  # the bound without a link
    assert plan.resident is not None
    assert plan.resident.tokens_per_s == pytest.approx(635, rel=0.01)
    assert plan.hot.tokens_per_s == pytest.approx(1849, rel=0.015)
    assert plan.break_even == 20


@pytest.mark.parametrize(
    ("link_gb_per_s", "gib", "slots", "gain"),
    [
        (37, 6, 4096, 2.68),
        (50, 8, 4096, 2.80),
        (50, 12, 4096, 2.42),
        (50, 16, 4096, 2.08),
        (50, 16, 8192, 2.33),
    ],
)
def test_more_memory_or_a_slower_link_leaves_less_to_gain(
    link_gb_per_s: float, gib: float, slots: int, gain: float
) -> None:
    plan = planned(hot_cost(link_gb_per_s=link_gb_per_s), gib=gib, slots=slots)
    assert plan.gain == pytest.approx(gain, rel=0.01)


@pytest.mark.parametrize(
    ("overlap", "next_layer", "shared"),
    [(0.35, 3.08, 4.23), (0.40, 3.17, 4.43), (0.50, 3.36, 4.86)],
)
def test_prefetch_hides_rows(overlap: float, next_layer: float, shared: float) -> None:
    assert planned(hot_cost(overlap=overlap, prefetch=2)).gain == pytest.approx(
        next_layer, rel=0.015
    )
    plan = planned(hot_cost("dsa-8l-shared", overlap, prefetch=1))
    assert plan.resident is not None
    assert (plan.resident.users, plan.hot.users) == (20, 128)
    assert plan.gain == pytest.approx(shared, rel=0.03)


def test_short_rows_are_bound_by_their_number() -> None:
    assert hot_cost(link_gb_per_s=None).rows_bytes_per_s == pytest.approx(36e6 * 1152)
    shared = hot_cost("dsa-8l-shared", link_gb_per_s=None)  # four layers' rows are one run
    assert shared.rows_bytes_per_s == pytest.approx(51.4e9, rel=0.01)
    glm = replace(shared, cache=replace(shared.cache, groups=GLM_5_2))
    alone, together = 2 / 36e6, 19 * 4 * 1152 / shared.rows_bytes_per_s
    assert glm.rows_bytes_per_s == pytest.approx(78 * 1152 / (alone + together))


def test_layers_that_share_a_selection_have_their_rows_fetched_as_one_run_or_behind_the_first() -> (
    None
):
    assert fetches(range(4, 8), ahead=False) == [range(4, 8)]
    assert fetches(range(4, 8), ahead=True) == [range(4, 5), range(5, 6), range(6, 8)]
    assert fetches(range(3, 10), ahead=True)[-1] == range(7, 10)
    assert fetches(range(1), ahead=True) == [range(1)]
    once, behind = (
        hot_cost("dsa-8l-shared", prefetch=prefetch, link_gb_per_s=None) for prefetch in (0, 1)
    )
    steps = [cost.step(100, 100, 4096) for cost in (once, behind)]
    # Two of three fetches have short rows, of which the first in each group is waited for.
    tokens = 2 * 100 * once.rows(4096).missed
    assert steps[1].link_s == pytest.approx(tokens * (2 / 36e6 + 2 * 1152 / once.rows_bytes_per_s))
    waited_s = [step.link_s - step.hidden_s for step in steps]
    assert waited_s[0] == pytest.approx(steps[0].link_s)
    # Of the first group the last layer alone has experts: the others hide next to nothing.
    assert tokens / 36e6 + 0.2 * steps[1].link_s < waited_s[1] < 0.6 * steps[1].link_s
    assert steps[0].link_s < steps[1].link_s
    assert steps[1].seconds < steps[0].seconds
    # The second group is guessed for: what is wrong comes for all of its layers.
    guessing = hot_cost("dsa-8l-shared", prefetch=2, link_gb_per_s=None)
    step, rows = guessing.step(100, 100, 4096), guessing.rows(4096)
    assert 2 * rows.missed - tokens / 200 == pytest.approx(240, rel=0.01)
    assert step.chip_s > steps[1].chip_s
    assert step.missed_bytes == pytest.approx(200 * (rows.missed + rows.guessed) * 4 * 1152)
    saved = (tokens - 200 * rows.missed) / 36e6
    assert waited_s[1] - (step.link_s - step.hidden_s) == pytest.approx(saved, rel=0.2)


def test_a_guess_hides_behind_the_experts_that_compute_before_its_layer() -> None:
    """Of eight layers the last five have experts, and the last four are guessed for."""
    cost = hot_cost(prefetch=2)
    guesses = cost.selections.guesses(CONTEXT, 2048, 4096, 0.8)
    rows, misses = cost.rows(4096), cost.selections.misses(CONTEXT, 2048, 4096)
    assert rows.guessed == pytest.approx(guesses.guessed / 2)
    assert rows.missed == pytest.approx((guesses.missed + misses) / 2)
    assert rows.right < rows.guessed
    step = cost.step(80, 80, 4096)
    ahead_s = 4 * 80 * guesses.guessed * 1152 / 50e9
    # Scores of a guess hide rows of the layer that makes it, too.
    assert ahead_s < step.hidden_s < 1.2 * ahead_s
    # A slow link is never hidden for longer than the layers compute that guess.
    slow = hot_cost(prefetch=2, link_gb_per_s=5).step(80, 80, 4096)
    experts_s = cost.cost.decode(80, CONTEXT).parts["experts"] * 4 / 5
    assert experts_s < slow.hidden_s < 1.2 * experts_s < slow.link_s
    assert replace(cost, right=0.5).rows(4096).missed > rows.missed
    assert hot_cost("dsa-8l-shared", prefetch=1).rows(4096).guessed == 0


def test_slots_are_solved_for_and_best() -> None:
    cost, room = hot_cost(), Room(6 * GIB, 64 * GIB)
    best = plan_hot_set(cost, room, 256)
    assert best is not None and best.slots % 64 == 0
    rates = []
    for slots in range(2048, 8192 + 1, 256):
        step = cost.hot_step(256, room, slots)
        assert step is not None
        rates.append(step.tokens_per_s)
    assert best.hot.tokens_per_s >= max(rates)


def test_requests_turn_hot_only_where_others_wait_and_it_pays() -> None:
    cost, room = hot_cost(), Room(6 * GIB, 64 * GIB)
    assert [cost.users_at_once(n, room, 4096) for n in (1, 18, 19, 20, 79, 256)] == [
        1, 18, 18, 20, 79, 79,
    ]  # fmt: skip
    assert cost.fewest_hot(18, room, 4096) == 0
    assert 0 < cost.fewest_hot(20, room, 4096) < 20
    # A slow link never pays.
    assert hot_cost(link_gb_per_s=1).users_at_once(256, room, 4096) == 18


def test_latency_and_host_memory_bound_how_many_are_hot() -> None:
    cost = hot_cost()
    plan = plan_hot_set(cost, Room(6 * GIB, 64 * GIB), 256, tpot_s=0.035, slots=4096)
    assert plan is not None and plan.limit == "TPOT"
    assert plan.hot.seconds <= 0.035 and 18 < plan.hot.users < 79
    assert cost.step(plan.hot.users + 2, plan.hot.num_hot + 2, 4096).seconds > 0.035
    plan = plan_hot_set(cost, Room(6 * GIB, 4 * GIB), 256, slots=4096)
    assert plan is not None and plan.limit == "host memory"
    assert plan.host_bytes <= 4 * GIB and plan.hot.num_hot < plan.hot.users
    assert plan_hot_set(cost, Room(0.05 * GIB, 64 * GIB), 256) is None


def test_a_model_without_an_indexer_has_no_hot_set() -> None:
    config = json.loads(
        (resources.files("hotset.cost") / "models" / "deepseek-v3.json").read_text()
    )
    assert SparseCache.of(shape_from_config(config, "deepseek-v3"), "bf16") is None
