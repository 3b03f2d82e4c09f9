"""Which rows are fetched for which layer, and when, without memory."""

from types import SimpleNamespace
from typing import Any

import torch

from hotset.attention.hot_rows import HotRows
from hotset.cost.cache_spec import KeysValues, Latent
from hotset.memory.arena import DeviceArena

LATENT = Latent(6, 2, KeysValues(2, 8, 8))


def hot_rows(index_dims: list[int]) -> tuple[HotRows, list[Any]]:
    """Rows of layers of which those with a width select; and what is fetched, in order."""
    arena = DeviceArena(
        [LATENT] * len(index_dims),
        num_blocks=3,
        block_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
        index_dims=index_dims,
    )
    totals = torch.tensor([[5, 3, 0]] * sum(dim > 0 for dim in index_dims))
    tables: Any = SimpleNamespace(totals=totals)
    layers: Any = [SimpleNamespace(index_dim=dim) for dim in index_dims]
    hot, fetched = HotRows(tables, arena, torch.zeros(2, 8, dtype=torch.uint8), layers), []

    def gather(host: Any, blocks: Any, places: Any, rows: Any, counts: Any, run: Any) -> None:
        fetched.append((run.start_bytes, run.row_bytes, run.rows_per_block))

    hot._gather = gather
    return hot, fetched


MISSES: Any = (None, None, None)


def test_each_layer_fetches_where_its_rows_are() -> None:
    hot, fetched = hot_rows([3, 0, 3])
    for layer in range(3):
        hot.fetch(layer, [MISSES])
    assert fetched == [(0, 32, 12), (4 * 32, 32, 12), (8 * 32, 32, 12)]


def test_rows_of_layers_that_share_a_selection_count_as_often_as_they_are_fetched() -> None:
    hot, _ = hot_rows([3, 0, 3, 0, 0])
    assert hot.counts() == (10, 6, 3 * 32 * 2 + 3 * 32 * 3)


class FakeAhead:
    """Runs work at once, and notes who waited."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.waited: list[int] = []

    def run(self, layers: range, work: Any) -> None:
        for layer in layers:
            work(layer)
            self.started.append(layer)

    def wait_for(self, layer: int) -> None:
        assert layer in self.started
        self.waited.append(layer)


def test_layers_that_share_a_selection_have_their_rows_fetched_with_the_first_and_wait() -> None:
    hot, _ = hot_rows([3, 0, 0, 3, 0])
    fetched = []

    def gather(*arguments: Any, **options: Any) -> None:
        fetched.append((arguments[-1].start_bytes // (4 * 32), len(options)))

    hot._gather, hot._ahead = gather, FakeAhead()  # type: ignore[assignment]
    for layer in range(5):
        hot.fetch(layer, [MISSES])
        wanted = {0: [0, 1, 2], 1: [0, 1, 2], 2: [0, 1, 2]}.get(layer, [0, 1, 2, 3, 4])
        assert [number for number, _ in fetched] == wanted
    assert hot._ahead.waited == [1, 2, 4]  # type: ignore[union-attr]
    assert [num_options for _, num_options in fetched] == [0, 1, 1, 0, 1]  # fewer programs beside
