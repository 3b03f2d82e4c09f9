"""Which rows are fetched for which layer, and when, without memory."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hotset.attention.hot_rows import HotRows
from hotset.cost.cache_spec import KeysValues, Latent
from hotset.memory.arena import DeviceArena

LATENT = Latent(6, 2, KeysValues(2, 8, 8))


def hot_rows(index_dims: list[int], *, ahead: bool = False) -> tuple[HotRows, list[Any]]:
    """Rows of layers of which those with a width select; and what is fetched, in order."""
    arena = DeviceArena(
        [LATENT] * len(index_dims),
        num_blocks=3,
        block_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
        index_dims=index_dims,
    )
    totals = torch.tensor([[5, 3, 0, 4, 2]] * sum(dim > 0 for dim in index_dims))
    tables: Any = SimpleNamespace(totals=totals, num_seats=2, resolve=lambda *_, **__: MISSES)
    host, fetched = torch.zeros(2, 8, dtype=torch.uint8), []
    hot = HotRows(tables, arena, host, fetches_ahead=ahead)

    def gather(*arguments: Any, **options: Any) -> None:
        fetched.append((arguments[-1], len(options)))

    hot._gather = gather
    return hot, fetched


MISSES: Any = (None, None, None)


def attend(hot: HotRows, num_layers: int, fetched: list[Any]) -> list[int]:
    """Have each layer fetch; how many fetches there were after each."""
    counts = []
    for layer in range(num_layers):
        if layer in hot._selections:
            hot.begin(layer, [MISSES])
        hot.fetch(layer, [MISSES])
        counts.append(len(fetched))
    return counts


def test_layers_that_share_a_selection_fetch_their_rows_at_once_where_they_are() -> None:
    hot, fetched = hot_rows([3, 0, 3])
    assert attend(hot, 3, fetched) == [1, 1, 2]
    # Bytes of the start, bytes of a row, layers, tokens of a block, rows per block and token.
    expected = [(0, 32, 2, 4, 12, 2), (2 * 4 * 32, 32, 1, 4, 12, 1)]
    assert [run for run, _ in fetched] == expected


def test_rows_of_layers_that_share_a_selection_count_as_often_as_they_are_fetched() -> None:
    hot, _ = hot_rows([3, 0, 3, 0, 0])
    assert hot.counts() == (10, 6, 8, 4, (3 + 4) * 32 * 2 + (3 + 4) * 32 * 3)


class FakeAhead:
    """Runs work at once, and notes who waited."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.waited: list[int] = []

    def run(self, layers: list[int], work: Any) -> None:
        for layer in layers:
            work(layer)
            self.started.append(layer)

    def wait_for(self, layer: int) -> None:
        assert layer in self.started
        self.waited.append(layer)


def test_layers_that_share_a_selection_have_their_rows_fetched_with_the_first_and_wait() -> None:
    hot, fetched = hot_rows([3, 0, 0, 0, 3, 0], ahead=True)
    hot._ahead = FakeAhead()  # type: ignore[assignment]
    assert attend(hot, 6, fetched) == [3, 3, 3, 3, 5, 5]
    assert hot._ahead.waited == [0, 1, 2, 4, 5]  # type: ignore[union-attr]
    assert [num_options for _, num_options in fetched] == [0, 1, 1, 0, 1]  # fewer programs beside
    assert [run for run, _ in fetched] == AHEAD


# The first layer's rows, those of the next, and then those of the next two.
AHEAD = [
    (0, 32, 1, 4, 24, 4),
    (32, 32, 1, 4, 24, 4),
    (2 * 32, 32, 2, 4, 24, 4),
    (4 * 4 * 32, 32, 1, 4, 24, 2),
    ((4 * 4 + 1) * 32, 32, 1, 4, 24, 2),
]


def test_a_cpu_fetches_ahead_in_the_same_parts_each_before_its_first_layer() -> None:
    hot, fetched = hot_rows([3, 0, 0, 0, 3, 0], ahead=True)
    assert attend(hot, 6, fetched) == [1, 2, 3, 3, 4, 5]
    assert [run for run, _ in fetched] == AHEAD


@pytest.mark.parametrize("beside", [False, True])
def test_rows_that_are_guessed_come_ahead_and_those_of_layers_that_share_them_after_the_selection(
    beside: bool,
) -> None:
    hot, fetched = hot_rows([3, 0, 0, 0, 3, 0], ahead=True)
    if beside:
        hot._ahead = FakeAhead()  # type: ignore[assignment]
    hot.begin(0, [MISSES])
    hot.fetch(0, [MISSES])
    fetched.clear()
    guess: Any = (None, None, None)
    hot.guess(0, [guess, guess])  # of two parts of a step
    fewer = int(beside)  # programs, while other kernels run
    assert fetched == [(AHEAD[3], fewer)] * 2
    if beside:
        assert hot._ahead.waited == [0]  # type: ignore[union-attr]
    hot.begin(4, [MISSES])
    for layer in (4, 5):
        hot.fetch(layer, [MISSES])
    assert fetched[2:] == [(AHEAD[3], 0), *[(AHEAD[4], fewer)] * 3]
    fetched.clear()
    assert attend(hot, 4, fetched)[-1] == 3  # nothing was guessed for these
