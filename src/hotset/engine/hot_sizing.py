"""Whether requests may turn hot, with how many tokens on the device, and when. Imports no torch."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotset.cost.hot_set import MOST_SLOTS, TABLE_BYTES, HotSetCost, Room, SparseCache
from hotset.cost.selection import DrawnSelections
from hotset.errors import ConfigError
from hotset.units import round_up_gib

if TYPE_CHECKING:
    from hotset.cost.step_time import CostModel

# Where the user names no number: twice what a step selects. Of trained models 35 to 50 % of a
# selection are in the next one too, and of these slots a step then misses 470 to 854 of 2,048
# tokens (docs/planner.md).
_SELECTIONS = 2
_OVERLAP = 0.4


@dataclass(frozen=True, slots=True)
class SparseSizes:
    """What a model with sparse attention selects and caches.

    Attributes:
        selected: tokens that a step attends to, per layer.
        row_bytes: of a token in all layers.
        index_bytes: of its index keys in all layers.
        index_layers: that select; the others take the selection of one before them.
    """

    selected: int
    row_bytes: int
    index_bytes: int
    index_layers: int


@dataclass(frozen=True, slots=True)
class HotSizes:
    """What hot requests get.

    Attributes:
        num_slots: tokens per request and layer that the device keeps, beside those that host memory
            does not have yet.
        num_seats: requests that can be hot at once.
        sparse: what the model selects and caches.
        is_asked: whether the user named the number: then no cost model says when it pays.
    """

    num_slots: int
    num_seats: int
    sparse: SparseSizes
    is_asked: bool

    def table_bytes(self, max_len: int) -> int:
        """Of the device's tables, for contexts of at most `max_len` tokens."""
        slots = TABLE_BYTES * self.num_slots * self.sparse.index_layers
        return self.num_seats * (slots + 2 * self.num_slots + 3 * max_len)


def solve_hot_sizes(
    asked: int | None,
    sparse: SparseSizes | None,
    *,
    why_not: str,
    block_size: int,
    max_num_seqs: int,
    max_len: int,
    host_slots: int,
    slot_bytes: int,
) -> HotSizes | None:
    """What hot requests get; None where none may turn hot.

    Args:
        asked: tokens per layer, by the user; 0 is never, None as is best.
        sparse: None where requests of the model cannot be hot.
        why_not: why.
        block_size: tokens of a block.
        max_num_seqs: most requests of a step.
        max_len: tokens of the longest context.
        host_slots: blocks that host memory holds.
        slot_bytes: of each.

    Raises:
        ConfigError: the number cannot work, with one that does.
    """
    if asked == 0:
        return None
    num_blocks = -(-max_len // block_size)
    if asked is None:
        if sparse is None or host_slots < num_blocks:
            return None
        num_slots = _whole_blocks(_SELECTIONS * sparse.selected, block_size)
        if num_slots >= max_len or num_slots > MOST_SLOTS:
            return None
        return HotSizes(num_slots, max_num_seqs, sparse, is_asked=False)
    if sparse is None:
        raise ConfigError(f"hot_tokens is {asked}, but {why_not}; leave hot_tokens out")
    if asked < sparse.selected:
        raise ConfigError(
            f"hot_tokens is {asked}, but a step attends to {sparse.selected} selected tokens per "
            f"layer; give {sparse.selected} or more"
        )
    if asked >= max_len:
        raise ConfigError(
            f"hot_tokens is {asked}, but the longest context has {max_len} tokens, so no request "
            "would ever be hot; give less, or leave hot_tokens out"
        )
    if host_slots < num_blocks:
        raise ConfigError(
            f"hot_tokens is {asked}, but host memory holds {host_slots * block_size} tokens and "
            f"one context has up to {max_len}; give host_gib "
            f"{round_up_gib(num_blocks * slot_bytes)} or more, or less max_model_len"
        )
    return HotSizes(_whole_blocks(asked, block_size), max_num_seqs, sparse, is_asked=True)


def _whole_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size) * block_size


class HotChoice:
    """How many requests are to run at once, some of them hot.

    Args:
        cost: of steps.
        cache: what a token takes.
        room: in which all lies.
        num_slots: of a hot request.
        most: requests of a step.
        tpot_s: that a step may take; None is no bound.
        must_pay: whether more than are resident run only where 5 % more tokens/s are predicted.
        prefetch: see `HotSetCost`.
    """

    def __init__(
        self,
        cost: "CostModel",
        cache: SparseCache,
        room: Room,
        *,
        num_slots: int,
        most: int,
        tpot_s: float | None = None,
        must_pay: bool = True,
        prefetch: int = 0,
    ) -> None:
        self._cost, self._cache, self._room = cost, cache, room
        self._num_slots, self._most = num_slots, most
        self._tpot_s, self._must_pay, self._prefetch = tpot_s, must_pay, prefetch
        self._known: Callable[[int, int], int] = functools.lru_cache(maxsize=4096)(self._solve)

    def __call__(self, wanted: int, context: float) -> int:
        """Of `wanted` requests that run or wait, with `context` tokens on average."""
        # Contexts that differ by 6 % at most are one, so that most answers are known.
        step = max(1, 2 ** (int(context).bit_length() - 5))
        return self._known(min(wanted, self._most), max(1, round(context / step)) * step)

    def _solve(self, wanted: int, context: int) -> int:
        selections = DrawnSelections(_OVERLAP)
        cost = HotSetCost(self._cost, self._cache, selections, context, prefetch=self._prefetch)
        asked = wanted, self._room, self._num_slots, self._tpot_s
        if self._must_pay:
            return cost.users_at_once(*asked)
        step = cost.hot_step(*asked)
        return 0 if step is None else step.users
