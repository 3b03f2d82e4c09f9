"""What a prompt would meet at a replica, by what that told last: the worked examples."""

from dataclasses import replace
from typing import Any

import pytest
from routed import BLOCK, HOST, LOAD, PROMPT, RATE, WARM, info, keys_of, prompt, snapshot

from hotset.engine.messages import Queued, num_pairs, size_class
from hotset.fleet.outlook import Estimate, Outlook, Speed, mean_speed


def estimates(queued: int) -> tuple[Estimate, Estimate]:
    """Of the example: a replica with 11,000 tokens in host memory, and a cold one."""
    keys = keys_of(prompt())
    warm, cold = Outlook(info()), Outlook(info())
    warm.index.take(snapshot(keys[: WARM // BLOCK], HOST))
    warm.take(replace(LOAD, queued_tokens=queued), 0.0)
    cold.take(LOAD, 0.0)
    rest = {"in_remote": 0, "others": mean_speed([warm.speed(), cold.speed()])}
    return warm.estimate(keys, PROMPT, 0.0, **rest), cold.estimate(keys, PROMPT, 0.0, **rest)


def test_a_warm_replica_is_predicted_as_the_design_has_it() -> None:
    warm, cold = estimates(0)
    assert (warm.found_tokens, warm.computed_tokens) == (WARM, PROMPT - WARM)
    assert (cold.found_tokens, cold.computed_tokens) == (0, PROMPT)
    assert warm.ttft_s == pytest.approx(0.058, abs=0.0005)
    assert cold.ttft_s == pytest.approx(0.344, abs=0.0005)


@pytest.mark.parametrize(("weight", "limit"), [(0.0, 9_991), (1.0, 20_991), (5.0, 64_991)])
def test_a_warm_replica_is_left_when_that_many_tokens_queue_there(
    weight: float, limit: int
) -> None:
    warm, cold = estimates(limit - 2)
    assert warm.cost_s(weight) < cold.cost_s(weight)
    warm, cold = estimates(limit + 2)
    assert warm.cost_s(weight) > cold.cost_s(weight)


def test_a_fixed_threshold_is_the_case_of_one_weight() -> None:
    """llm-d leaves a warm endpoint at 14 s of queue: for 65,000 warm tokens that is 3.4."""
    rate, warm_tokens, queued = 20_480.0, 65_000, 286_720
    saved_s = warm_tokens / rate
    warm = Estimate(warm_tokens, 0, queued, 1, queued / rate, 0.0, 0.0)
    cold = Estimate(0, warm_tokens, 0, 1, 0.0, saved_s, saved_s)
    assert queued / rate == 14.0 and saved_s == pytest.approx(3.17, abs=0.005)
    assert warm.cost_s(3.4) > cold.cost_s(3.4)
    assert warm.cost_s(3.42) < cold.cost_s(3.42)


def estimate(queue: dict[int, int], computed: int, **load: Any) -> Estimate:
    """Of a cold prompt where others wait: how many by how many tokens each has."""
    classes = [Queued(0, 0, 0)] * 20
    for size, num in queue.items():
        classes[size_class(size)] = Queued(num, num * size, num * num_pairs(0, size))
    outlook = Outlook(info())
    tokens = sum(size * num for size, num in queue.items())
    outlook.take(replace(LOAD, queue=classes, queued_tokens=tokens, **load), 0.0)
    others = mean_speed([outlook.speed()])
    return outlook.estimate([], computed, 0.0, in_remote=0, others=others)


def test_longer_prompts_wait_while_a_shorter_one_is_computed_but_for_a_part_of_each_step() -> None:
    short, long = estimate({500: 2, 60_000: 3}, 700), estimate({500: 2, 60_000: 3}, 100_000)
    assert short.queued_tokens == long.queued_tokens == 181_000
    assert long.queued_s == pytest.approx(181_000 / RATE) and long.num_behind == 0
    assert short.queued_s == pytest.approx((1000 + 1700 / 3) / RATE) and short.num_behind == 3
    assert short.cost_s(0.0) == pytest.approx(short.ttft_s + 3 * 700 / RATE)
    assert estimate({2000: 1}, 1000).queued_s == pytest.approx(1000 / 3 / RATE)
    assert estimate({20: 1}, 10).queued_s == pytest.approx(10 / 3 / RATE)  # of the longer one
    assert estimate({1000: 1}, 800).queued_s == pytest.approx(1000 / RATE)  # of about one size


def test_tokens_of_long_prompts_take_longer() -> None:
    """With 12,500 tokens before it, a token takes twice as long."""
    told = {"token_s": 1 / RATE, "pair_s": 1 / RATE / 12_500}
    one = estimate({100_000: 1}, 120_000, **told)
    assert one.queued_s == pytest.approx((100_000 + 100_000**2 / 2 / 12_500) / RATE)
    assert one.ready_s == one.computed_s == pytest.approx((120_000 + 120_000**2 / 25_000) / RATE)
    short = estimate({100_000: 1}, 300, **told)  # of whose tokens each takes 5 times as long
    assert short.queued_s == pytest.approx(100 * 5 / RATE)


def test_a_replica_that_does_not_tell_of_sizes_is_taken_to_have_small_prompts() -> None:
    outlook = Outlook(info())
    outlook.take(replace(LOAD, queued_tokens=5000), 0.0)
    one = outlook.estimate([], 100, 0.0, in_remote=0, others=mean_speed([outlook.speed()]))
    assert one.queued_s == pytest.approx(5000 / RATE) and one.num_behind == 0


def test_a_mean_speed_counts_each_by_its_tokens() -> None:
    assert mean_speed([]).token_s == 0.001
    speeds = [Speed(0, 0.0, 0.0), Speed(100, 30.0, 0.1, 2.0), Speed(300, 50.0, 0.3)]
    assert mean_speed(speeds) == pytest.approx((400, 45.0, 0.25, 0.5))
