"""Requests that keep their hottest tokens on the device and the others in host memory.

A *resident* request has the rows of all its tokens on the device. A *hot* request has `slots` of
them per layer, the last used ones, and fetches what a step selects beside them. Index keys of both
stay on the device, as each step reads all of them. Planner and engine ask the same functions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from hotset.cost.cache_spec import Latent, groups_of, index_places
from hotset.cost.row_link import GroupRows, waiting_s
from hotset.cost.selection import GUESSED, Guesses
from hotset.cost.shape import ModelShape
from hotset.cost.step_time import CostModel, Step

TAIL_TOKENS = 128  # the block that is being filled, and one that is being copied down
TABLE_BYTES = 6  # of a slot: its position in 4 bytes, its place in the order of use in 2
SLOT_STEP = 64  # slots are whole blocks
MOST_SLOTS = 2**15  # of a request, as the device's tables number them in 16 bits
LEAST_GAIN = 0.05  # of tokens/s, for which requests turn hot
_GUESS_KERNELS = 14  # of a layer that guesses: projections, scores, and what finds their rows


class Misses(Protocol):
    """What tells how many rows a step misses: `DrawnSelections` or a recorded file."""

    @property
    def overlap(self) -> float:
        """Share of a selection that the next one has as well."""
        ...

    def misses(self, context: float, selected: int, slots: int) -> float:
        """Rows per layer, of `selected` among `context`, with `slots` of them on the device."""
        ...

    def guesses(self, context: float, selected: int, slots: int, right: float) -> Guesses:
        """The same of a layer that is guessed for, by guesses that have `right` of a selection."""
        ...


@dataclass(frozen=True)
class SparseCache:
    """What a model with an indexer keeps of a token.

    Attributes:
        groups: layers of attention by the indexer that selects for them, see `groups_of`.
        row_bytes: of a token in one layer.
        index_bytes: of a token's index keys over all layers.
        top_k: tokens that a query selects.
    """

    groups: tuple[int, ...]
    row_bytes: int
    index_bytes: int
    top_k: int

    @classmethod
    def of(cls, shape: ModelShape, kv_dtype: str) -> "SparseCache | None":
        """That of a model; None where some layer keeps no latents or attends to all of them."""
        layers = [layer.attention for layer in shape.layers]
        indexers = [attention.indexer for attention in layers]
        if not all(indexers) or not all(isinstance(a.cache, Latent) for a in layers):
            return None
        groups = groups_of([not one.is_shared for one in indexers if one])
        return cls(
            groups=tuple(map(len, groups)),
            row_bytes=layers[0].token_bytes(kv_dtype),
            index_bytes=shape.index_bytes_per_token,
            top_k=max(one.top_k for one in indexers if one),
        )

    @property
    def num_layers(self) -> int:
        """Layers of attention."""
        return sum(self.groups)

    @property
    def index_layers(self) -> int:
        """Layers with an indexer of their own; the others take their selections."""
        return len(self.groups)

    @property
    def all_rows_bytes(self) -> int:
        """A token's rows in all layers."""
        return self.num_layers * self.row_bytes

    def resident_bytes(self, context: float) -> float:
        """Of a resident request on the device, and of a hot one in host memory."""
        return context * (self.all_rows_bytes + self.index_bytes)

    @cached_property
    def keys_bytes(self) -> float:
        """Device bytes per token whose rows are in host memory: its index keys, and what is lost.

        They lie in blocks that hold index keys alone, in place of rows too, and none lies across
        the end of a block.
        """
        period = self.index_bytes // math.gcd(self.all_rows_bytes, self.index_bytes)
        places = [index_places(i, self.all_rows_bytes, self.index_bytes) for i in range(period)]
        return self.resident_bytes(1) / (1 + sum(map(len, places)) / period)

    def hot_bytes(self, context: float, slots: int) -> float:
        """Of a hot request on the device."""
        whole = min(context, slots + TAIL_TOKENS)
        tables = TABLE_BYTES * slots * self.index_layers
        return self.resident_bytes(whole) + tables + (context - whole) * self.keys_bytes


def fetches(layers: range, *, ahead: bool) -> list[range]:
    """Layers whose missing rows come at once, of those that share a selection.

    Args:
        layers: that share it. Their rows of a token lie side by side, and one run of bytes comes
            faster than several short ones.
        ahead: whether rows come while earlier layers compute. Then the first layer waits for its
            own rows alone; while a layer that has its rows computes, the rows of one more come.
    """
    if not ahead:
        return [layers]
    parts, done = [layers[:1]], 1
    while done < len(layers):
        parts.append(layers[done : 2 * done])
        done *= 2
    return parts


def guesses_between(with_experts: Sequence[bool], has_experts: bool) -> bool:
    """Whether the next selection is guessed: the rows that come ahead take longer than a dense MLP.

    Args:
        with_experts: of the layers from one that selects to the next that does, which have experts.
        has_experts: whether any layer of the model has; else all are guessed for.
    """
    return any(with_experts) or not has_experts


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of one device for KV and index keys, and of its host for hot requests.

    Attributes:
        device_bytes: of the device.
        host_bytes: of the host.
        has_prompts: whether prompts are computed there, which needs all rows of one request on the
            device; else requests come with what another engine computed.
    """

    device_bytes: float
    host_bytes: float
    has_prompts: bool = True


@dataclass(frozen=True, slots=True)
class HotStep:
    """A decode step with hot requests.

    Attributes:
        users: in it.
        num_hot: hot ones among them.
        chip_s: with all rows on the device.
        link_s: that the missed rows take on the link.
        hidden_s: of these, behind other work.
        missed_bytes: over the link.
    """

    users: int
    num_hot: int
    chip_s: float
    link_s: float
    hidden_s: float
    missed_bytes: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.chip_s + self.link_s - self.hidden_s

    @property
    def tokens_per_s(self) -> float:
        """A token per user and step."""
        return self.users / self.seconds


@dataclass(frozen=True)
class HotSetCost:
    """Steps of one model on one device with resident and hot requests.

    Attributes:
        cost: of steps with all rows on the device.
        cache: what a token takes.
        selections: how many rows are missed.
        context: mean tokens of a request.
        link_bytes_per_s: at which the device gathers rows; None is what its kernels are known to
            reach with rows of this size.
        prefetch: 0 fetches what a layer and those that share its selection miss once it has
            selected; 1 fetches the rows of the latter behind the first one; 2 also those that the
            next layer's indexer selects on this layer's input, which costs scoring all keys once
            more.
        right: share of a selection that such a guess has.
    """

    cost: CostModel
    cache: SparseCache
    selections: Misses
    context: float
    link_bytes_per_s: float | None = None
    prefetch: int = 0
    right: float = GUESSED

    @property
    def rows_bytes_per_s(self) -> float:
        """Rate at which missed rows come: bound by bytes, by their number where they are short."""
        return self.cache.all_rows_bytes / sum(map(sum, self._token_s))

    @cached_property
    def _fetches(self) -> list[list[range]]:
        return [fetches(range(count), ahead=self.prefetch > 0) for count in self.cache.groups]

    @cached_property
    def _token_s(self) -> list[tuple[float, float]]:
        """Seconds of a missed token's rows, by group of layers: of the first run, of the others."""
        return [
            (self._run_s(len(first)), sum(self._run_s(len(part)) for part in later))
            for first, *later in self._fetches
        ]

    @cached_property
    def _guesses(self) -> list[bool]:
        """By group of layers, whether the next group's selection is guessed."""
        if self.prefetch < 2:
            return [False] * self.cache.index_layers
        with_experts = [layer.num_experts > 0 for layer in self.cost.shape.layers]
        found, start = [], 0
        for size in self.cache.groups:
            between = with_experts[start : start + size]
            found.append(guesses_between(between, any(with_experts)))
            start += size
        return [*found[:-1], False]

    def _run_s(self, num_layers: int) -> float:
        num_bytes = num_layers * self.cache.row_bytes
        if self.link_bytes_per_s is not None:
            return num_bytes / self.link_bytes_per_s
        at_least_s = 1 / self.cost.calibration.gather_rows_per_s
        return max(at_least_s, num_bytes / self.cost.expert_bytes_per_s())

    def rows(self, slots: int) -> Guesses:
        """Per hot request and step, mean over the layers that select."""
        plain, guessed = self._rows(slots)
        share = sum(self._guesses) / self.cache.index_layers
        mean = [one + share * (other - one) for one, other in zip(plain, guessed, strict=True)]
        return Guesses(*mean)

    def _rows(self, slots: int) -> tuple[Guesses, Guesses]:
        """Of a layer that is not guessed for, and of one that is."""
        asked = self.context, self.cache.top_k, slots
        plain = Guesses(0.0, 0.0, self.selections.misses(*asked))
        return plain, self.selections.guesses(*asked, self.right) if any(self._guesses) else plain

    def step(self, users: int, num_hot: int, slots: int) -> HotStep:
        """A decode step of `users`, of which `num_hot` are hot with `slots` slots each."""
        step = self.cost.decode(users, self.context)
        if not num_hot:
            return HotStep(users, 0, step.expected_s, 0.0, 0.0, 0.0)
        # A launch over the tables for each layer that selects, and one for each fetch.
        more_s = sum(1 + len(parts) for parts in self._fetches) * self.cost.kernel_s
        tables = 2 * TABLE_BYTES * slots * self.cache.index_layers * num_hot
        more_s += tables / self.cost.memory_bytes_per_s
        # Guesses score the keys of hot requests once more.
        scoring_s = step.parts.get("index", 0.0) / self.cache.index_layers * num_hot / users
        scoring_s += _GUESS_KERNELS * self.cost.kernel_s
        groups = self._groups(self._layers_s(step, more_s), scoring_s, num_hot, slots)
        link_s = sum(group.link_s for group in groups)
        chip_s = step.expected_s + more_s + sum(group.scoring_s for group in groups)
        plain, guessed = self._rows(slots)
        tokens = sum(
            size * (plain.missed if not is_guessed else guessed.missed + guessed.guessed)
            for size, is_guessed in zip(
                self.cache.groups, [False, *self._guesses[:-1]], strict=True
            )
        )
        missed_bytes = num_hot * tokens * self.cache.row_bytes
        hidden_s = max(0.0, link_s - waiting_s(groups))
        return HotStep(users, num_hot, chip_s, link_s, hidden_s, missed_bytes)

    def _groups(
        self, layers_s: list[float], scoring_s: float, num_hot: int, slots: int
    ) -> list[GroupRows]:
        """What each group of layers computes, a guess in `scoring_s`, and asks of the link."""
        rows, found = self._rows(slots), []
        start, is_guessed = 0, False
        for parts, guesses in zip(self._fetches, self._guesses, strict=True):
            own, ahead = rows[is_guessed], rows[1].guessed if guesses else 0.0
            first, *later = (num_hot * self._run_s(len(part)) for part in parts)
            behind = zip(parts[1:], later, strict=True)
            end = start + parts[-1].stop
            group = GroupRows(
                layers_s[start:end],
                own.missed * first,
                {part.start: (own.missed + own.guessed) * run_s for part, run_s in behind},
                scoring_s if guesses else 0.0,
                ahead * num_hot * self._run_s(1),
            )
            found.append(group)
            start, is_guessed = end, guesses
        return found

    def _layers_s(self, step: Step, more_s: float) -> list[float]:
        """Seconds of a step by layer: by its experts and its dense weights, the rest evenly."""
        layers = self.cost.shape.layers
        experts_s, dense_s = (step.parts.get(name, 0.0) for name in ("experts", "dense_weights"))
        rest_s = (step.expected_s + more_s - experts_s - dense_s) / len(layers)
        num_experts = sum(layer.num_experts for layer in layers)
        dense = sum(layer.dense.count for layer in layers)
        return [
            experts_s * layer.num_experts / max(1, num_experts)
            + dense_s * layer.dense.count / dense
            + rest_s
            for layer in layers
        ]

    def resident_users(self, room: Room) -> int:
        """Resident requests that fit."""
        return int(room.device_bytes // self.cache.resident_bytes(self.context))

    def most_users(self, room: Room, slots: int) -> int:
        """Requests that fit with as many of them hot as host memory holds."""
        hot = self.cache.hot_bytes(self.context, slots)
        resident = self.cache.resident_bytes(self.context)
        beside = room.device_bytes - (resident if room.has_prompts else 0.0)
        beside = max(0.0, beside)  # the last that came has all its rows there
        num_hot = min(room.host_bytes // resident, beside // hot)
        return int(num_hot + (room.device_bytes - num_hot * hot) // resident)

    def fewest_hot(self, users: int, room: Room, slots: int) -> int:
        """Hot requests among `users` at least, so that all fit; `most_users` of them do."""
        resident = self.cache.resident_bytes(self.context)
        too_much = users * resident - room.device_bytes
        if too_much <= 0:
            return 0
        saved = resident - self.cache.hot_bytes(self.context, slots)
        return min(users, math.ceil(too_much / saved))

    def resident_step(self, wanted: int, room: Room) -> HotStep | None:
        """The step without hot requests, where `wanted` requests run or wait; None: none fits."""
        users = min(wanted, self.resident_users(room))
        return self.step(users, 0, 0) if users else None

    def hot_step(
        self, wanted: int, room: Room, slots: int, tpot_s: float | None = None
    ) -> HotStep | None:
        """The step with as many of `wanted` requests as fit and keep `tpot_s`; None: none does."""

        def step(users: int) -> HotStep:
            return self.step(users, self.fewest_hot(users, room, slots), slots)

        low, high = 0, min(wanted, self.most_users(room, slots))
        if tpot_s is not None:
            while low < high:  # a step only grows with its users
                middle = (low + high + 1) // 2
                low, high = (middle, high) if step(middle).seconds <= tpot_s else (low, middle - 1)
        return step(high) if high else None

    def users_at_once(
        self, wanted: int, room: Room, slots: int, tpot_s: float | None = None
    ) -> int:
        """Requests to run at once, where `wanted` run or wait.

        More than `resident_users` only where that makes at least `LEAST_GAIN` more tokens per
        second: while fewer run than this, and none fits, the running request that frees most turns
        hot.
        """
        resident = self.resident_step(wanted, room)
        hot = self.hot_step(wanted, room, slots, tpot_s)
        if hot and (resident is None or _pays(resident, hot)):
            return hot.users
        return resident.users if resident else 0


def _pays(resident: HotStep, hot: HotStep) -> bool:
    return hot.tokens_per_s >= (1 + LEAST_GAIN) * resident.tokens_per_s
