"""Several engines, seen as one."""

from collections import Counter
from dataclasses import fields, replace

from hotset.engine.status import EngineStatus, StateStatus, TierStatus
from hotset.fleet.sums import merge_engines, sum_metrics
from hotset.metrics import Metrics


def engine(cells: str, *, block_bytes: int = 8, states: StateStatus | None = None) -> EngineStatus:
    used = len(cells) - cells.count("f")
    tier = TierStatus("device", len(cells), used, block_bytes, cells, len(cells))
    return EngineStatus(1, 0, 0, 2, 3, "mppwww", (tier,), {"host": 5.0}, 100.0, states)


def test_every_counter_of_engines_is_added_and_the_parts_stay_as_they_are() -> None:
    parts = [Metrics(), Metrics()]
    for one in fields(Metrics):
        for part in parts:
            is_count = isinstance(getattr(part, one.name), Counter)
            setattr(part, one.name, Counter(a=2) if is_count else 2)
    total = sum_metrics(parts)
    for one in fields(Metrics):
        value = getattr(total, one.name)
        if one.name == "expert_rounding_error":
            assert value == 2
        else:
            assert value == (Counter(a=4) if isinstance(value, Counter) else 4), one.name
    assert parts[0].moved_bytes == Counter(a=2)
    assert sum_metrics([]) == Metrics()


def test_tiers_of_one_name_and_size_are_one_and_users_and_rates_are_added() -> None:
    states = StateStatus(64, 4, 1, 2, {"host": 3})
    merged = merge_engines([engine("hhff", states=states), engine("cf", states=states)])
    [device] = merged.tiers
    assert (device.capacity, device.used, device.cells) == (6, 3, "hhffcf")
    assert (merged.num_moving, merged.num_parked, merged.num_waiting) == (2, 4, 6)
    assert merged.users == "mppwww" * 2
    assert merged.link_bytes_per_s == {"host": 10.0} and merged.prefill_tokens_per_s == 200.0
    assert merged.states == StateStatus(64, 8, 2, 4, {"host": 6})


def test_blocks_of_two_sizes_are_not_added_and_a_large_map_keeps_its_proportions() -> None:
    merged = merge_engines([engine("h" * 8), engine("h" * 8, block_bytes=16)])
    assert [(tier.block_bytes, tier.capacity) for tier in merged.tiers] == [(8, 8), (16, 8)]
    many = merge_engines([engine("h" * 1024), engine("f" * 3072)]).tiers[0]
    assert len(many.cells) == 1024 and many.cells.count("h") == 256
    assert (many.capacity, many.used) == (4096, 1024)


def test_a_store_that_replicas_share_is_there_once() -> None:
    views = [
        replace(engine("h"), tiers=(TierStatus("remote", 100, used, 8, "c", 100),))
        for used in (40, 60)
    ]
    [store] = merge_engines(views).tiers
    assert (store.capacity, store.used) == (100, 60)
