"""When a split follows the load, with the costs of a real model."""

from dataclasses import replace

import pytest
from test_expert_cost import GIB, KV, cost_of, slots_of

from hotset.cost.expert_split import Splitter
from hotset.cost.expert_steps import Load
from hotset.cost.split_policy import Move, SplitPolicy

CROWD, FEW = Load(256, 1024, 256), Load(8, 1024, 256)


def splitter(target: str = "throughput") -> Splitter:
    slots = replace(slots_of(), fewest_ever=4)
    return Splitter(36 * GIB, cost_of(), slots, KV, target, 8192, 4, 127)


def best(load: Load, target: str = "throughput") -> int:
    split = splitter(target).solve(load)
    assert split is not None
    return split.num_slots


def moves(policy: SplitPolicy, num_slots: int, loads: list[Load]) -> list[tuple[int, Move]]:
    """Those of a load a second, each of which is made at once; with the seconds."""
    found = []
    for second, load in enumerate(loads):
        policy.observe(second, load)
        move = policy.choose(second, num_slots)
        if move is not None:
            found.append((second, move))
            num_slots = move.new.num_slots
    return found


def test_a_load_as_expected_moves_nothing() -> None:
    assert best(CROWD) + 20 < best(FEW)
    assert moves(SplitPolicy(splitter(), CROWD), best(CROWD), [CROWD] * 60) == []
    # A little less than the best is good enough.
    assert moves(SplitPolicy(splitter(), FEW), best(FEW) - 2, [FEW] * 60) == []


@pytest.mark.parametrize(("before", "after"), [(CROWD, FEW), (FEW, CROWD)])
@pytest.mark.parametrize("target", ["throughput", "latency"])
def test_another_load_that_stays_is_followed_after_a_while_in_one_direction(
    before: Load, after: Load, target: str
) -> None:
    start, end = best(before, target), best(after, target)
    made = moves(SplitPolicy(splitter(target), before), start, [before] * 20 + [after] * 100)
    assert made and all(second >= 26 for second, _ in made)
    way = [start, *(move.new.num_slots for _, move in made)]
    assert way == sorted(way, reverse=end < start)
    assert len(made) <= 6
    assert made[0][1].old.num_slots == start
    # The last one leaves less than a tenth to gain.
    solved = splitter(target)
    last, ideal = solved.solve(after, way[-1]), solved.solve(after)
    assert last is not None and ideal is not None
    if target == "throughput":
        assert ideal.served.output_tokens_per_s < 1.11 * last.served.output_tokens_per_s


def test_a_short_crowd_and_a_pause_move_nothing() -> None:
    policy = SplitPolicy(splitter(), FEW)
    assert moves(policy, best(FEW), [FEW] * 20 + [CROWD] * 1 + [FEW] * 40) == []
    policy.observe(1e6, replace(CROWD, users=9))  # hours later
    assert policy.load.users < 9 and policy.choose(1e6, best(FEW)) is None
