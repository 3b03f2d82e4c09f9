import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.engine.fair_queue import FairQueue
from hotset.engine.latency import Histogram, Latencies, RequestClock


def test_a_tenant_that_floods_the_queue_delays_itself_only() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(100):
        queue.push("flood", 0, f"flood-{i}")
    for _ in range(3):
        queue.pop()
        queue.charge("flood", prompt_tokens=10)
    queue.push("other", 0, "other-0")
    queue.charge("flood", output_tokens=1)
    assert queue.pop() == "other-0"


def test_idle_time_earns_no_credit() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.charge("busy", prompt_tokens=1000)
    queue.push("busy", 0, "busy-0")
    for i in range(4):
        queue.push("new", 0, f"new-{i}")
        queue.push("busy", 0, f"busy-{i + 1}")
    order = []
    while len(queue):
        order.append(queue.pop())
        queue.charge(order[-1].split("-")[0], prompt_tokens=10)
    # Lifted to where the busy one is: they alternate, though the new one was served nothing.
    assert [name.split("-")[0] for name in order[:6]].count("new") == 3


def test_a_much_shorter_one_overtakes_and_a_long_one_gets_its_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("first", "second"):
        queue.push("a", 0, name, size=1000)
    queue.push("a", 0, "short", size=10)
    assert queue.peek() == "short"
    order = []
    for i in range(1000):
        order.append(queue.pop())
        queue.charge("a", prompt_tokens=1000 if order[-1] in ("first", "second") else 10)
        if order[-1] == "second":
            break
        queue.push("a", 0, f"short {i}", size=10)
    shorts = [name for name in order if name.startswith("short")]
    # Short ones went before until 8,000 tokens were served since the long ones came.
    assert order[0] == "short" and 680 <= len(shorts) <= 800
    assert order.index("first") < order.index("second") <= order.index("first") + 1


def test_a_lower_priority_goes_first_whoever_it_is_of() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", 1, "batch")
    queue.push("b", 0, "chat")
    queue.charge("b", prompt_tokens=1000)
    assert [queue.pop(), queue.pop()] == ["chat", "batch"]
    with pytest.raises(IndexError):
        queue.pop()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1), st.integers(0, 50))))
def test_every_item_comes_out_once_and_in_order_within_its_tenant(
    pushes: list[tuple[str, int, int]],
) -> None:
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    for i, (tenant, priority, tokens) in enumerate(pushes):
        queue.push(tenant, priority, (tenant, priority, i))
        queue.charge(tenant, output_tokens=tokens)
    removed = [item for i, item in enumerate(list(queue)) if i % 3 == 0]
    for item in removed:
        assert queue.remove(item[0], item[1], item)
        assert not queue.remove(item[0], item[1], item)
    popped = [queue.pop() for _ in range(len(queue))]
    assert sorted([*popped, *removed], key=lambda item: item[2]) == [
        (tenant, priority, i) for i, (tenant, priority, _) in enumerate(pushes)
    ]
    for key in {item[:2] for item in popped}:
        mine = [i for *k, i in popped if tuple(k) == key]
        assert mine == sorted(mine)


def test_percentiles_are_of_the_values_and_counts_fall_in_their_buckets() -> None:
    histogram = Histogram([1.0, 2.0])
    assert histogram.percentiles(0.5) == [None]
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 1, 1]  # a bound belongs to the bucket below it
    assert histogram.percentiles(0.5, 1.0) == [1.0, 9.0]


def test_a_request_is_timed_from_its_submission_by_output_index() -> None:
    latencies = Latencies()
    clock = RequestClock(latencies, 10.0)
    clock.start(11.0)
    clock.start(12.0)  # only the first counts
    clock.output(0, 1, 13.0)
    clock.output(1, 1, 13.5)
    clock.output(0, 0, 13.8)  # no token, no time
    clock.output(0, 1, 14.0)
    clock.output(1, 1, 15.0)
    clock.end(7, 15.0)
    assert latencies.queue.percentiles(1.0) == [1.0]
    assert latencies.ttft.percentiles(1.0) == [3.0]
    assert sorted(latencies.itl._recent) == [1.0, 1.5]
    assert latencies.e2e.percentiles(1.0) == [5.0]
    assert latencies.output_tokens.sum == 4
    assert latencies.tpot.percentiles(1.0) == [2.0]  # two tokens an output: one gap from 13 to 15
