"""What hot requests get, and when they pay. Needs no torch."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from test_sizing import DENSE, sizes

from hotset.cost.attention import Attention, Kind
from hotset.cost.hot_set import Room, SparseCache
from hotset.cost.params import Params
from hotset.cost.shape import Layer
from hotset.engine.hot_sizing import HotChoice, SparseSizes
from hotset.engine.sizing import Sizes
from hotset.errors import ConfigError

# A token takes 1,024 bytes in 32 bits.
SPARSE = replace(
    DENSE,
    sparse=SparseSizes(selected=64, row_bytes=216, index_bytes=40, index_layers=2),
    why_not_hot="",
)


def hot(**given: Any) -> Sizes:
    return sizes(SPARSE, **{"host_gib": 0.01, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hot_tokens": 63}, "attends to 64 selected tokens per layer; give 64 or more"),
        ({"hot_tokens": 1024}, "the longest context has 1024 tokens, so no request would ever be"),
        ({"hot_tokens": 100, "host_gib": 0}, "host memory holds 0 tokens and one context has up"),
        (
            {"hot_tokens": 100, "host_gib": 0.0005},
            "host memory holds 512 tokens and one context has up to 1024; give host_gib 0.00",
        ),
        ({"hot_tokens": 40_000}, "expected 0 (all) to 32768 tokens"),
    ],
)
def test_a_number_that_cannot_work_is_refused_with_what_does(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        hot(**given)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_model_that_attends_to_all_tokens_has_no_hot_requests() -> None:
    with pytest.raises(ConfigError, match="hot_tokens is 100, but its layers attend to all tokens"):
        sizes(DENSE, hot_tokens=100, host_gib=1)
    assert sizes(DENSE, host_gib=1).hot is None
    assert sizes(DENSE, host_gib=1, hot_tokens=0).hot is None


def test_slots_are_whole_blocks_and_the_host_memory_that_is_said_to_do_does() -> None:
    with pytest.raises(ConfigError) as refused:
        hot(hot_tokens=65, host_gib=0.0005)
    enough = float(str(refused.value).split("give host_gib ")[1].split()[0])
    found = hot(hot_tokens=65, host_gib=enough)
    assert found.hot is not None and found.hot.num_slots == 80 and found.hot.is_asked


def test_without_a_number_it_is_twice_what_a_step_selects_where_host_memory_holds_a_context() -> (
    None
):
    found = hot().hot
    assert found is not None and found.num_slots == 128 and not found.is_asked
    assert hot(host_gib=0).hot is None
    assert hot(max_model_len=128).hot is None


def test_tables_are_counted_in_the_workspace() -> None:
    found = hot(hot_tokens=128, max_num_seqs=10)
    assert found.hot is not None
    # Positions and order of 128 slots in 2 layers, one scratch row of slots, and 3 bytes per token.
    assert found.hot.table_bytes(1024) == 10 * (6 * 128 * 2 + 2 * 128 + 3 * 1024)
    assert found.workspace_bytes == SPARSE.workspace_bytes + found.hot.table_bytes(1024)


class FakeCost:
    """Steps that take 10 ms plus 0.1 ms per user, on a device whose link is what the test says."""

    memory_bytes_per_s = 1e12
    kernel_s = 1e-6
    shape = SimpleNamespace(layers=[Layer(Attention(Kind.MLA), mlp=Params(1))] * 8)

    def __init__(self, link_bytes_per_s: float) -> None:
        self._link = link_bytes_per_s
        self.calibration = type("Calibration", (), {"gather_rows_per_s": 1e9})

    def expert_bytes_per_s(self) -> float:
        return self._link

    def decode(self, users: int, context: float) -> Any:
        return type("Step", (), {"expected_s": 0.01 + 1e-4 * users, "parts": {}})


@pytest.mark.parametrize(("link_bytes_per_s", "users"), [(50e9, 16), (1e6, 2)])
def test_more_run_at_once_where_the_link_lets_that_pay(link_bytes_per_s: float, users: int) -> None:
    cache = SparseCache(groups=(1,) * 8, row_bytes=1152, index_bytes=2048, top_k=2048)
    context = 16_384
    room = Room(2.5 * cache.resident_bytes(context), 1e12)
    choice = HotChoice(FakeCost(link_bytes_per_s), cache, room, num_slots=4096, most=16)  # type: ignore[arg-type]
    assert choice(2, context) == 2
    got = choice(100, context)
    assert got == users if users == 2 else 2 < got <= 16


def test_a_bound_on_steps_bounds_who_runs_and_is_refused_where_nobody_can_be_hot() -> None:
    cache = SparseCache(groups=(1,) * 8, row_bytes=1152, index_bytes=2048, top_k=2048)
    room = Room(2.5 * cache.resident_bytes(16_384), 1e12)
    made = {"num_slots": 4096, "most": 16, "must_pay": False}
    free, bound = (
        HotChoice(FakeCost(50e9), cache, room, **made, tpot_s=tpot_s)  # type: ignore[arg-type]
        for tpot_s in (None, 0.0105)
    )
    assert 2 <= bound(100, 16_384) < free(100, 16_384)
    with pytest.raises(ConfigError, match=r"tpot_ms is 50\.0, but no request may be hot here"):
        sizes(DENSE, tpot_ms=50.0)
    assert hot(tpot_ms=50.0).hot is not None
