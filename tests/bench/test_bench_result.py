"""From observations to figures, a sentence, a table and a page."""

from typing import Any
from xml.etree import ElementTree

import pytest

from hotset.bench.charts import Bar, bar_chart, chart, thin, ticks
from hotset.bench.html import page, rates
from hotset.bench.predict import BufferedExperts, Prediction, predict
from hotset.bench.presets import PRESETS
from hotset.bench.report import table, text
from hotset.bench.result import ArmRun, BenchResult, Failure, summarise, verify
from hotset.bench.verdict import verdict
from hotset.bench.workload import Spec, make_work
from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.catalog import find_config
from hotset.cost.expert_steps import ExpertCost, link_of
from hotset.cost.hardware import choose_hardware, load_hardware
from hotset.cost.loaded import make_cost_model
from hotset.plan.svg import Limit, Line
from hotset.units import GIB

MACHINE = {
    "command": "hotset bench <test>",
    "commit": None,
    "versions": {"torch": "0"},
    "cpu": "a CPU",
    "cpu_cores": 2,
    "cpu_threads": 2,
    "host_memory_bytes": 10**9,
    "gpus": [],
}


def arm_run(arm: str, wall_s: float, *, repeat: int = 0, **changes: Any) -> ArmRun:
    """A run as the driver would hand it back."""
    is_tiered = arm != "hot"
    engine = {
        "computed_tokens": 400 if is_tiered else 1000,
        "recomputed_tokens": 0,
        "cached_tokens": {"host": 600} if is_tiered else {},
        "moved_bytes": {"host>device": 5 * 10**9} if is_tiered else {},
        "preemptions": 3 if is_tiered else 0,
        "steps": 10,
        "mean_step_ms": 1.5,
    }
    sizes = {
        "hot_tokens": 100,
        "hot_bytes": 10**8,
        "host_bytes": 10**9,
        "disk_bytes": 0,
        "work_kv_tokens": 900,
        "work_known_tokens": 600,
        "link_bytes_per_s": {"host": 10**10} if is_tiered else {},
    }
    values: dict[str, Any] = {
        "is_complete": True,
        "wall_s": wall_s,
        "requests": 4,
        "failed": 0,
        "first_error": None,
        "prompt_tokens": 1200,
        "output_tokens": 40,
        "latencies": {"ttft_s": summarise([0.1, 0.2]), "tpot_s": summarise([0.01])},
        "ttft_by_turn_s": [0.1, 0.2],
        "tpot_by_turn_s": [0.01, 0.01],
        "engine": engine,
        "sizes": sizes,
        **changes,
    }
    return ArmRun(arm, repeat, **values)


def bench_result(*runs: ArmRun) -> BenchResult:
    asked = {"workload": {"users": 2}, "engine": {}, "model": "tiny", "dtype": "float32"}
    result = BenchResult("some <work>", asked, MACHINE, runs=list(runs))
    result.verdict = verdict(result)
    return result


def test_percentiles_are_values_that_were_seen() -> None:
    found = summarise([float(i) for i in range(1, 101)])
    assert found == {"mean": 50.5, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert summarise([3.0])["p99"] == 3.0
    assert summarise([]) == {}


@pytest.mark.parametrize(
    ("hot_s", "host_s", "beginning", "reason"),
    [
        (10.0, 4.0, "Tiering paid: `host` took 4.00 s and `hot` 10.00 s, 2.50 times", "600 tokens"),
        (10.0, 10.4, "Tiering made no difference", "within the 5% that runs differ by"),
        (10.0, 10.1, "Tiering made no difference", "0.5 s of the link"),
        (10.0, 12.5, "Tiering cost 20%", "(preemptions: 0 without tiers, 3 with)"),
    ],
)
def test_the_sentence_says_whether_tiering_paid_and_why(
    hot_s: float, host_s: float, beginning: str, reason: str
) -> None:
    sentence = bench_result(arm_run("hot", hot_s), arm_run("host", host_s)).verdict
    assert sentence.startswith(beginning)
    assert reason in sentence
    assert sentence.endswith(".") and "\n" not in sentence


def expert_run(arm: str, wall_s: float, *, hits: int = 0, gb: int = 0) -> ArmRun:
    run = arm_run(arm, wall_s)
    run.engine |= {
        "expert_hits": 3 * hits,
        "expert_misses": hits,
        "expert_bytes": gb * 10**9,
        "expert_hit_rate": 0.75 if hits else None,
    }
    run.sizes |= {
        "experts_device_bytes": 2 * 10**9 if arm == "experts" else 8 * 10**9,
        "experts_host_bytes": 8 * 10**9 if arm == "experts" else 0,
    }
    return run


def test_experts_in_host_memory_are_compared_with_resident_ones() -> None:
    result = bench_result(expert_run("resident", 4.0), expert_run("experts", 10.0, hits=5, gb=7))
    assert result.baseline == "resident" and result.ratio("experts") == 0.4
    assert result.verdict == (
        "6 GB less on the device for experts: `experts` took 10.00 s and `resident` 4.00 s, "
        "2.50 times as long; 75.0% of the experts that were needed were there, and 7 GB of "
        "experts came from host memory."
    )
    shown = {line.split("  ")[0]: line.split() for line in table(result).splitlines()}
    assert shown["experts on device / host, GB"][-6:] == ["8.00", "/", "0.00", "2.00", "/", "8.00"]
    assert shown["needed experts: there / not"][-4:] == ["-", "15", "/", "5"]
    assert shown["experts to device, GB"][-2:] == ["-", "7.00"]
    assert "times as fast as resident" in page(result)
    assert "of needed experts were on the device, experts" in page(result)
    streamed = bench_result(expert_run("resident", 4.0), expert_run("experts", 4.1, gb=7)).verdict
    assert "the same within the 5% that runs differ by; 7 GB of experts came" in streamed
    again = [expert_run("resident", 4.1), expert_run("experts", 9.0, hits=5, gb=7)]
    noisy = bench_result(
        expert_run("resident", 4.0), expert_run("experts", 30.0, hits=5, gb=7), *again
    )
    assert "but runs of one arm differ by up to 233%: repeat" in noisy.verdict
    alone = bench_result(expert_run("experts", 4.1, gb=7))
    assert "`resident` was not run; compare with --arms resident,experts" in alone.verdict
    both = bench_result(
        arm_run("hot", 10.0),
        arm_run("host", 4.0),
        expert_run("resident", 4.0),
        expert_run("experts", 10.0, gb=7),
    )
    assert both.baseline == "hot"
    assert both.verdict.startswith("Tiering paid") and "2.50 times as long" in both.verdict
    assert "experts" not in table(bench_result(arm_run("hot", 10.0)))


def test_the_sentence_names_work_that_fits_and_work_without_reuse() -> None:
    hot = arm_run("hot", 10.0)
    hot.sizes["hot_tokens"] = 1000
    assert "holds all 900" in bench_result(hot, arm_run("host", 10.0)).verdict
    alone = arm_run("hot", 10.0)
    alone.sizes["work_known_tokens"] = 0
    nothing = arm_run("host", 10.0)
    nothing.engine["cached_tokens"] = {"device": 5}
    assert "no prompt repeats another" in bench_result(alone, nothing).verdict


def test_arms_that_differ_less_than_their_own_runs_get_no_verdict() -> None:
    runs = [arm_run("hot", 10.0), arm_run("hot", 20.0, repeat=1)]
    runs += [arm_run("host", 8.0), arm_run("host", 12.0, repeat=1)]
    sentence = bench_result(*runs).verdict
    assert sentence.startswith("No verdict") and "differ by up to 100%" in sentence
    near = [arm_run("hot", 10.0), arm_run("hot", 10.7, repeat=1)]
    near += [arm_run("host", 9.6), arm_run("host", 9.7, repeat=1)]
    assert "made no difference" in bench_result(*near).verdict
    clear = [arm_run("hot", 10.0), arm_run("hot", 12.0, repeat=1), arm_run("host", 4.0)]
    assert bench_result(*clear).verdict.startswith("Tiering paid")


def test_where_requests_come_by_the_clock_their_own_times_are_compared() -> None:
    hot, host = (
        arm_run(arm, 10.0, latencies={"e2e_s": summarise([seconds])})
        for arm, seconds in (("hot", 0.9), ("host", 0.3))
    )
    result = bench_result(hot, host)
    result.is_open_loop = True
    assert result.ratio("host") == pytest.approx(3.0)
    assert verdict(result).startswith(
        "Tiering paid: `host` answered in 0.30 s on average and `hot` in 0.90 s, 3.00 times"
    )
    assert "times as fast as hot (mean of requests)" in table(result)


def test_a_run_that_broke_off_gets_no_verdict() -> None:
    half = arm_run("host", 5.0, is_complete=False, failed=2, first_error="no room")
    result = bench_result(arm_run("hot", 10.0), half)
    assert result.verdict.startswith("No verdict")
    assert "host: 2 requests failed: no room" in text(result)


def test_of_several_runs_the_one_of_median_wall_time_is_shown() -> None:
    runs = [arm_run("hot", wall_s, repeat=i) for i, wall_s in enumerate((9.0, 5.0, 7.0))]
    result = bench_result(*runs, arm_run("host", 3.5))
    assert result.typical("hot").wall_s == 7.0
    assert result.ratio("host") == 2.0
    assert "9.00 5.00 7.00" in table(result)


def test_answers_are_compared_up_to_the_first_difference_of_a_session() -> None:
    one = arm_run("hot", 1.0, outputs={(0, 0): [1, 2], (0, 1): [3], (1, 0): [4], (1, 1): [5]})
    two = arm_run("host", 1.0, outputs={(0, 0): [1, 9], (0, 1): [8], (1, 0): [4], (1, 1): [5]})
    found = verify([one, two])
    assert found["differing"] == 1
    (run,) = found["runs"]
    assert (run["compared"], run["not_compared"]) == (3, 1)
    assert run["first_difference"] == {"session": 0, "turn": 0, "token": 1}
    assert verify([one, one])["differing"] == 0


def samples(arm: str) -> dict[str, list[float]]:
    size = 10**9 if arm != "hot" else 0
    names = ("device_held", "device_cached", "running", "waiting", "computed_tokens")
    found = {name: [0.0, 5e7, 1e8, 0.0] for name in names}
    moved = ("host_used", "to_device", "to_host", "disk_used", "from_disk", "to_disk")
    return (
        {"t_s": [0.0, 0.3, 0.6, 1.0]}
        | found
        | {name: [0.0, size / 4, size / 2, size] for name in moved}
    )


PREDICTION = {
    **{"hardware": "h200", "wall_s": 9.0, "total_tokens_per_s": 130.0, "link_s": 0.4},
    **{"output_tokens_per_s": 4.0, "ttft_s": None, "prefill_s": 1.0, "decode_s": 2.0},
    **{"computed_tokens": 900.0, "fetched_tokens": 100.0},
}


def test_the_page_stands_alone_and_its_charts_are_well_formed() -> None:
    runs = [
        arm_run(arm, wall_s, samples=samples(arm), prediction=dict(PREDICTION))
        for arm, wall_s in (("hot", 10.0), ("host", 4.0))
    ]
    result = bench_result(*runs, arm_run("http://x/v1", 5.0, engine={}, sizes={}))
    result.failures.append(Failure("host+disk", 0, "no <disk>"))
    shown = page(result)
    for outside in ("<script", "src=", "href=", "@import", "url("):
        assert outside not in shown
    assert "some &lt;work&gt;" in shown and "no &lt;disk&gt;" in shown
    assert "Tiering paid" in shown
    charts = shown.split("<svg")[1:]
    assert len(charts) >= 9
    for one in charts:
        ElementTree.fromstring("<svg" + one.split("</svg>")[0] + "</svg>")
    assert "measured limit to the device, 10.0 GB/s" in shown


def test_ticks_are_round_and_cover_the_values() -> None:
    for high in (0.0007, 0.9, 1.0, 7.0, 33.0, 99_999.0):
        marks = ticks(high)
        assert marks[0] == 0 and marks[-1] >= high * 0.999
        assert 3 <= len(marks) <= 9
    assert ticks(0.0) == [0.0, 1.0]


def test_charts_cope_with_nothing_and_with_one_point() -> None:
    assert "Nothing was recorded" in chart([], [], "x", "y", label="none")
    one = chart([Line("a", [(0.0, 0.0)], "kv")], [Limit("top", 2.0)], "x", "y", label="one")
    ElementTree.fromstring(one.split("<p ")[0])
    ElementTree.fromstring(bar_chart([Bar("a", 0.0, 0.0, "kv")], label="zero", digits=1))


def test_thinned_points_keep_the_peak() -> None:
    points = [(float(i), 1.0) for i in range(5000)]
    points[1234] = (1234.0, 9.0)
    shown = thin(points)
    assert len(shown) <= 400
    assert (1234.0, 9.0) in shown


def test_rates_are_bytes_between_samples() -> None:
    found = rates([0.0, 0.5, 1.0], [0.0, 1e9, 1e9])
    assert found == [(0.5, 2.0), (1.0, 0.0)]


# vLLM 0.24 on an H200, without its offload and with 64 GiB of it: s.
@pytest.mark.parametrize(
    ("engine", "within", "name", "hot_gib", "without_s", "with_s"),
    [  # vLLM 0.24, and this engine (benchmarks/results/gpu_h200.md)
        ("published", 0.15, "A512", 109.5, 6.86, None),
        ("published", 0.15, "A4096", 109.5, 52.60, None),
        ("published", 0.15, "B", 16.0, 68.45, 67.29),
        ("published", 0.15, "C3", 16.0, 35.29, 20.01),
        ("published", 0.15, "C6", 16.0, 60.30, 25.26),
        ("hotset", 0.06, "A512", 109.5, 6.79, None),
        ("hotset", 0.06, "A4096", 105.0, 51.69, None),
        ("hotset", 0.06, "B", 16.0, None, 64.70),
        ("hotset", 0.06, "C3", 16.0, 35.38, 16.94),
        ("hotset", 0.06, "C6", 16.0, 60.76, 19.88),
    ],
)
def test_predictions_are_near_what_was_measured(
    engine: str,
    within: float,
    name: str,
    hot_gib: float,
    without_s: float | None,
    with_s: float | None,
) -> None:
    config, short, _ = find_config("llama-3.1-8b")
    cost = make_cost_model(config, short, "bfloat16", load_hardware("h200"))
    assert cost.calibration == CALIBRATIONS["hotset"]
    cost.calibration = CALIBRATIONS[engine]
    work = make_work(PRESETS[name].spec, 128_256)
    for host_gib, measured_s in ((0, without_s), (64, with_s)):
        if measured_s is None:
            continue
        found = predict(
            cost,
            work,
            hot_tokens=int(hot_gib * GIB) // 131_072,
            host_tokens=host_gib * GIB // 131_072,
            disk_tokens=0,
            max_num_seqs=256,
            max_batched_tokens=8192,
        )
        assert found.wall_s == pytest.approx(measured_s, rel=within)
        if not host_gib:
            assert found.fetched_tokens == 0


def qwen(
    num_requests: int, output_tokens: int, *, slots: int | None, hit_rate: float | None = None
) -> Prediction:
    """Requests of 512 tokens to Qwen3-30B-A3B in bf16 on an H200, with 20 GiB of KV."""
    config, short, _ = find_config("qwen3-30b-a3b")
    cost = make_cost_model(config, short, "bfloat16", load_hardware("h200"))
    spec = Spec("unshared", users=num_requests, first_tokens=512, output_tokens=output_tokens)
    experts = None
    if slots is not None:
        experts = BufferedExperts(ExpertCost(cost, link_of(cost, hit_rate=hit_rate)), slots)
    return predict(
        cost,
        make_work(spec, 151_936),
        hot_tokens=20 * GIB // 98_304,
        host_tokens=0,
        disk_tokens=0,
        max_num_seqs=256,
        max_batched_tokens=8192,
        experts=experts,
    )


def test_experts_in_host_memory_make_steps_what_is_predicted() -> None:
    # A third of 128 experts on the device: 55 misses a layer, 24.8 GB a step, 0.49 s.
    few = qwen(16, 256, slots=43)
    assert few.decode_s == pytest.approx(255 * 0.495, rel=0.03)
    assert few.prefill_s == pytest.approx(38.5e9 / 51e9, rel=0.05)  # one pass: 8,192 tokens
    # 16 passes of prompts and 31 steps of decodes, each of them all that is missing.
    many = qwen(256, 32, slots=43)
    assert many.wall_s == pytest.approx(47 * 38.5e9 / 51e9, rel=0.05)
    assert many.ttft_s is not None and many.ttft_s < many.prefill_s
    assert qwen(16, 256, slots=43, hit_rate=0.6).wall_s < 0.75 * few.wall_s


def test_all_experts_on_the_device_are_predicted_alike_in_both_ways() -> None:
    for num_requests, output_tokens in ((256, 256), (16, 256), (256, 32)):
        plain = qwen(num_requests, output_tokens, slots=None)
        whole = qwen(num_requests, output_tokens, slots=128)
        assert whole.wall_s == pytest.approx(plain.wall_s, rel=0.06)


def test_the_profile_of_a_gpu_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from hotset.cost import hardware as module

    class Missing:
        def is_file(self) -> bool:
            return False

    monkeypatch.setattr(module, "probe_path", Missing)
    for gpu, name in (
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ):
        found = choose_hardware(None, gpu)
        assert found is not None and found.name == name
    assert choose_hardware(None, "Some Other") is None
    assert choose_hardware(None, None) is None
    assert choose_hardware("l40s", None) is not None
