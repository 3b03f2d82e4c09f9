"""Steps of several GPUs: what a layout divides, what collectives add, what eight links give."""

import itertools
from dataclasses import replace

import pytest

from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.catalog import load_model
from hotset.cost.expert_steps import ExpertCost, Load, link_of
from hotset.cost.hardware import Hardware, load_hardware
from hotset.cost.layout import candidate_layouts, check_layout, shard_model
from hotset.cost.points import seconds_at
from hotset.cost.routing import Routing
from hotset.cost.step_time import CostModel
from hotset.cost.together import Together, together_from_json
from hotset.cost.wire import Wire
from hotset.errors import PlanError
from hotset.layout import Layout, parse_layout

H200, OURS = load_hardware("h200"), CALIBRATIONS["hotset"]


def cost_of(model: str, layout: Layout, hardware: Hardware = H200) -> CostModel:
    shape = load_model(model).stored
    return CostModel(shape, hardware, layout, "bf16", OURS, Routing())


@pytest.mark.parametrize(
    ("model", "users", "milliseconds"),
    [
        ("llama-3-8b", 1, 3.8),
        ("llama-3-8b", 64, 5.4),
        ("llama-3-8b", 256, 11.0),
        ("llama-3-70b", 1, 22),
        ("llama-3-70b", 64, 26),
        ("llama-3-70b", 256, 50),
    ],
)
def test_decode_steps_of_two_gpus_are_within_a_tenth_of_what_was_expected(
    model: str, users: int, milliseconds: float
) -> None:
    step = cost_of(model, Layout(2)).decode(users, 1024)
    assert step.expected_s * 1e3 == pytest.approx(milliseconds, rel=0.1)
    one = cost_of(model, Layout(1)).decode(users, 1024)
    assert step.parts["launch"] == one.parts["launch"]  # which is why two do not give twice
    for name in ("dense_weights", "attention"):
        assert step.parts[name] == pytest.approx(one.parts[name] / 2, rel=0.001)


def expert_seconds(gpus: int, share: float) -> tuple[float, float]:
    """Workload D with 51 of 128 experts, and a decode step of 16 users with 81, on the device.

    `share` is the width of host copies over 16 bits.
    """
    cost = cost_of("qwen3-30b-a3b", Layout(gpus))
    link = link_of(cost)
    experts = ExpertCost(cost, replace(link, cold_bytes=link.cold_bytes * share))
    load = Load(256, 512, 32, num_requests=256)
    served = experts.serve(51, load, kv_tokens=256 * 560, max_step_tokens=8192)
    return served.prompt_s + served.decode_s, experts.decode_step(81, 16, 528).seconds


def test_experts_in_host_memory_over_two_links_are_served_1_9_times_as_fast() -> None:
    (one_s, one_step_s), (two_s, two_step_s) = (expert_seconds(gpus, 1.0) for gpus in (1, 2))
    assert one_s == pytest.approx(31.9, rel=0.01) and one_step_s == pytest.approx(0.280, rel=0.01)
    assert 1.9 <= one_s / two_s < 2 and 1.9 <= one_step_s / two_step_s < 2


def test_eight_links_give_eight_times_less_what_a_step_does_not_divide() -> None:
    (one_s, one_step_s), (all_s, all_step_s) = (expert_seconds(gpus, 1.0) for gpus in (1, 8))
    assert one_s / all_s == pytest.approx(7.98, rel=0.005)
    assert one_step_s / all_step_s == pytest.approx(7.16, rel=0.01)
    for narrow in (0.5, 0.27):  # the narrower the copies, the more of a step is the chip's
        ratio = expert_seconds(1, narrow)[1] / expert_seconds(8, narrow)[1]
        assert 6 < ratio < one_step_s / all_step_s


def test_slices_beat_whole_experts_for_few_users_and_one_copy_of_kv_wins_with_many() -> None:
    def step_s(layout: Layout, users: int) -> float:
        per_group = max(1, users / layout.dp)
        cost = cost_of("qwen3-30b-a3b", layout)
        return cost.decode(per_group, 2048, mean_users=users / layout.dp).expected_s

    slices, whole, groups, replicas = (
        Layout(8), Layout(8, ep=8), Layout(1, 8, es=8), Layout(1, 8),
    )  # fmt: skip
    assert step_s(slices, 16) < step_s(whole, 16) and step_s(slices, 16) < step_s(groups, 16)
    assert step_s(groups, 256) < step_s(slices, 256) < step_s(replicas, 256)
    assert step_s(groups, 1024) == pytest.approx(step_s(slices, 1024) * 14 / 21.5, rel=0.05)


@pytest.mark.parametrize(
    ("ranks", "tokens", "expected"),
    [(2, 1, 1.27), (4, 1, 1.77), (8, 1, 2.48), (2, 16, 1.05), (4, 16, 1.14), (8, 16, 1.25)],
)
def test_whole_experts_load_the_busiest_rank_as_draws_do(
    ranks: int, tokens: int, expected: float
) -> None:
    busiest = Routing().distinct_on_rank(128, 8, tokens, ranks)
    assert busiest / (Routing().distinct(128, 8, tokens) / ranks) == pytest.approx(
        expected, rel=0.05
    )
    assert Routing().distinct_on_rank(128, 8, 1024, ranks) == pytest.approx(128 / ranks)


def test_layouts_have_words_for_slices_and_keep_their_meaning_without() -> None:
    assert parse_layout("tp=2") == Layout(2, es=2) == Layout(2)
    assert parse_layout("dp=2,es=2") == Layout(1, 2, es=2) == parse_layout("es=2")
    assert parse_layout("ep=72") == Layout(1, 72, 72, 1)
    assert Layout(1, 2) != Layout(1, 2, es=2)  # two replicas, and two groups over slices
    for text in ("tp=1", "tp=8", "dp=8", "dp=8,ep=8", "tp=2,dp=4,ep=8", "dp=8,ep=4,es=2"):
        layout = parse_layout(text)
        assert str(layout) == text and parse_layout(str(layout)) == layout
        check_layout(layout, load_model("qwen3-30b-a3b"), None)
    found = candidate_layouts(load_model("qwen3-30b-a3b"), 2)
    assert [str(layout) for layout in found] == [
        "dp=2",
        "dp=2,es=2",
        "dp=2,ep=2",
        "tp=2",
        "tp=2,ep=2",
    ]
    assert [str(layout) for layout in candidate_layouts(load_model("llama-3-8b"), 2)] == [
        "dp=2", "tp=2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "dtype", "layout", "line"),
    [
        (
            "llama-3-8b", None, "tp=3",
            "tp=3 does not divide the 32 attention heads of llama-3-8b; possible: 1, 2, 4, 8, 16, "
            "32",
        ),
        (
            "smollm2-135m", None, "tp=2",
            "tp=2 does not divide the 9 attention heads of smollm2-135m; possible: 1, 3, 9",
        ),
        (
            "llama-4-scout", None, "tp=5",
            "tp=5 neither divides the 8 KV heads of llama-4-scout nor is a multiple of them; "
            "possible: 1, 2, 4, 8, 40",
        ),
        (
            "qwen3-30b-a3b", "int4", "tp=8",
            "int4 has groups of 128 and 8 slices of the experts of qwen3-30b-a3b are 96 wide; use "
            "fp8, or ep=4,es=2",
        ),
        (
            "qwen3-30b-a3b", None, "dp=5,es=5",
            "5 slices do not divide the width 768 of the experts of qwen3-30b-a3b; use ep=5, which "
            "spreads them whole",
        ),
        (
            "llama-3-8b", None, "dp=2,es=2",
            "es=2 spreads experts, and llama-3-8b has none; use tp and dp",
        ),
        (
            "qwen3-30b-a3b", None, "dp=8,ep=4,es=4",
            "ep=4 x es=4 must be a multiple of tp=1 and divide the 8 GPUs of dp=8,ep=4,es=4",
        ),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused_in_one_line(
    model: str, dtype: str | None, layout: str, line: str
) -> None:
    with pytest.raises(PlanError) as refused:
        check_layout(parse_layout(layout), load_model(model, dtype), None)
    assert str(refused.value) == line


def test_a_layout_that_is_offered_instead_can_be() -> None:
    check_layout(parse_layout("dp=8,ep=4,es=2"), load_model("qwen3-30b-a3b", "int4"), None)


def test_an_engine_that_keeps_embeddings_whole_holds_them_on_each_rank_and_reads_none_more() -> (
    None
):
    for model in ("llama-3-8b", "qwen3-30b-a3b"):
        shape = load_model(model)
        cut, whole = (
            shard_model(shape, Layout(4), has_whole_embedding=is_whole)
            for is_whole in (False, True)
        )
        assert whole.dense_bytes - cut.dense_bytes == shape.embedding_bytes * 3 / 4
        assert whole.dense_read_bytes == pytest.approx(cut.dense_read_bytes)
    tied = load_model("smollm2-135m")
    alone = shard_model(tied, Layout(), has_whole_embedding=True)
    assert alone.dense_bytes == alone.dense_read_bytes == tied.dense_bytes
    cut = shard_model(tied, Layout(3))  # whose head reads its part of the embeddings
    assert cut.dense_read_bytes == cut.dense_bytes
    shared = shard_model(tied, Layout(3), has_whole_embedding=True)
    # A tied head is rows of the embeddings that are there anyway: a view, see `cut_head`.
    assert shared.dense_bytes == tied.rank_dense_bytes(3) + tied.embedding_bytes
    assert shared.dense_read_bytes == pytest.approx(cut.dense_read_bytes)


def test_what_was_measured_together_stands_before_what_one_gpu_says() -> None:
    measured = H200.together[2]
    wire = Wire(H200, OURS)
    assert wire.all_reduce_s(2, 2**20) == pytest.approx(10.3e-6)
    assert wire.all_reduce_s(4, 2**20) == Wire(replace(H200, together={}), OURS).all_reduce_s(
        4, 2**20
    )
    assert wire.all_reduce_s(1, 2**20) == wire.all_gather_s(1, 2**20) == 0
    assert wire.reduce_scatter_s(2, 2**20) == wire.all_gather_s(2, 2**20) == pytest.approx(15.4e-6)
    assert cost_of("llama-3-8b", Layout(2)).link_bytes_per_s() == measured.link_bytes_per_s
    slow = replace(H200, together={2: Together("a switch", link_bytes_per_s=27e9)})
    assert cost_of("llama-3-8b", Layout(2), slow).link_bytes_per_s() == 27e9
    assert cost_of("llama-3-8b", Layout(1), slow).link_bytes_per_s() > 50e9
    # Another link was not measured.
    assert cost_of("llama-3-8b", Layout(2), slow.with_link("pcie5")).link_bytes_per_s() > 50e9


def test_times_between_points_lie_on_lines_and_only_grow() -> None:
    points = H200.together[2].all_reduce
    sizes = [1, 100, *(size for size, _ in points), 10**9]
    times = [seconds_at(points, size) for size in sizes]
    assert times[0] == points[0][1] and all(a <= b for a, b in itertools.pairwise(times))
    assert times[2:-1] == pytest.approx([seconds for _, seconds in points])
    middle = seconds_at(points, (points[-2][0] + points[-1][0]) / 2)
    assert middle == pytest.approx((points[-2][1] + points[-1][1]) / 2)
    rate = (10**9 - points[-1][0]) / (times[-1] - points[-1][1])
    assert rate == pytest.approx((points[-1][0] - points[-2][0]) / (points[-1][1] - points[-2][1]))


@pytest.mark.parametrize(
    ("together", "words"),
    [
        ([], "not an object"),
        ({"1": {"source": "x"}}, "together has '1'"),
        ({"2": {}}, "names no source"),
        ({"2": {"source": "x", "host_link_gb_per_s": 0}}, "host_link_gb_per_s is 0"),
        ({"2": {"source": "x", "all_reduce_us": {"few": 1}}}, "a size of 'few'"),
        ({"2": {"source": "x", "all_reduce_us": {"8": "1"}}}, "all_reduce_us is '1'"),
    ],
)
def test_a_profile_with_other_figures_of_several_gpus_is_refused(
    together: object, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        together_from_json(together, "mine")


def test_sums_without_nvlink_are_told_with_what_they_take() -> None:
    def note(name: str, *, has_peers: bool = True) -> str:
        wire = Wire(load_hardware(name), CALIBRATIONS["hotset"])
        return wire.slow_note(2, 256, (32, 4096), has_peers=has_peers)

    assert note("h200") == ""
    slow = note("l40s")
    assert slow.startswith(
        "warning: GPUs of l40s have no NVLink: sums over 2 ranks go through NCCL"
    )
    assert slow.endswith(" ms of a step of 256 requests")
    away = note("h200", has_peers=False)
    assert "do not reach each other's memory" in away
    took = float(away.split("about ")[1].split()[0])
    assert 2 < took < 10  # 64 sums of 2 MiB at 64 GB/s are 2.1 ms
