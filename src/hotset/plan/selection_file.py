"""Selections recorded from a real model, replayed for any number of slots. Imports numpy, no torch.

A file is an archive of numpy arrays (`.npz`). `gaps_0`, `gaps_1`, ... are int32, `[steps, layers,
K]`, one for each request: in each of successive decode steps what each layer with an indexer
selected, as the first of its K positions and the distances from one to the next. `about` is a JSON
text that says where it comes from.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotset.cost.selection import MOST_OVERLAP, DrawnSelections, Guesses
from hotset.errors import ConfigError, PlanError

FEWEST_STEPS, MOST_STEPS = 8, 512  # of a request; of more the last ones are replayed
_MOST_POSITION = 2**24
_WANTED = "expected int32 arrays gaps_0, ... [steps, layers, K] in a .npz file"
Positions = NDArray[np.int32]


def save_selections(path: Path, requests: Sequence[Positions], about: dict[str, Any]) -> None:
    """Write what `load_selections` reads.

    Args:
        path: of the file.
        requests: `[steps, layers, K]` positions of each, in any order.
        about: where they come from.

    Raises:
        ConfigError: no request has enough steps, or the file cannot be written.
    """
    long = [each for each in requests if len(each) >= FEWEST_STEPS]
    if not long:
        raise ConfigError(
            f"no request decoded {FEWEST_STEPS} steps with more tokens than a layer selects; give "
            "longer prompts or answers"
        )
    arrays: dict[str, Any] = {"about": np.array(json.dumps(about))}
    for number, each in enumerate(long):
        gaps = np.diff(np.sort(each, axis=2), axis=2, prepend=np.int32(0))
        arrays[f"gaps_{number}"] = gaps.astype(np.int32)
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


@dataclass(frozen=True, eq=False)
class RecordedSelections:
    """Selections of some requests of one model; see the module.

    Attributes:
        path: of their file, for messages.
        requests: `[steps, layers, K]` int32 positions of each, with the same layers and K.
    """

    path: Path
    requests: tuple[Positions, ...]

    @property
    def selected(self) -> int:
        """K."""
        return int(self.requests[0].shape[2])

    @cached_property
    def layer_overlaps(self) -> tuple[float, ...]:
        """Of each layer, the share of a selection that the next step's has as well."""
        common = np.sum([_common(each) for each in self.requests], axis=0)
        pairs = sum(len(each) - 1 for each in self.requests)
        return tuple(float(each) / (pairs * self.selected) for each in common)

    @property
    def overlap(self) -> float:
        """Their mean."""
        return sum(self.layer_overlaps) / len(self.layer_overlaps)

    def misses(self, context: float, selected: int, slots: int) -> float:
        """Rows that a step misses in a layer, mean over layers and the last 3/4 of the steps.

        Raises:
            PlanError: the model selects other than K tokens, or `slots` hold no selection.
        """
        if selected != self.selected:
            raise PlanError(
                f"selection file {self.path} has {self.selected} positions per step and layer, but "
                f"the model selects {selected}; record one of this model"
            )
        if slots < selected:
            raise PlanError(f"a hot set of {slots} tokens does not hold a selection of {selected}")
        if slots >= context:
            return 0.0
        distances, samples = self._distances
        hits = int(np.searchsorted(distances, slots))
        return (len(distances) - hits) / samples

    def guesses(self, context: float, selected: int, slots: int, right: float) -> Guesses:
        """See `DrawnSelections.guesses`, by whose misses these are scaled: a file has no guesses.

        Raises:
            PlanError: see `misses`.
        """
        misses = self.misses(context, selected, slots)
        drawn = DrawnSelections(min(self.overlap or 1 / selected, MOST_OVERLAP))
        if not (theirs := drawn.misses(context, selected, slots)):
            return Guesses(misses, right * misses, (1 - right) * misses)
        found = drawn.guesses(context, selected, slots, right)
        return Guesses(*(rows * misses / theirs for rows in found))

    @cached_property
    def _distances(self) -> tuple[NDArray[np.float64], int]:
        """Of each selected row, how many others were used since; ascending, with their samples."""
        found = [_reuse_distances(each) for each in self.requests]
        samples = sum((len(each) - len(each) // 4) * each.shape[1] for each in self.requests)
        return np.sort(np.concatenate(found)), samples


def _common(positions: Positions) -> NDArray[np.int64]:
    """Positions that each step has of the one before, summed over steps, for each layer."""
    steps, layers, _ = positions.shape
    common = np.zeros(layers, dtype=np.int64)
    for layer in range(layers):
        seen = np.full(int(positions.max()) + 1, -1)
        for step in range(steps):
            chosen = positions[step, layer]
            if step:
                common[layer] += np.count_nonzero(seen[chosen] == step - 1)
            seen[chosen] = step
    return common


def _reuse_distances(positions: Positions) -> NDArray[np.float64]:
    """Of each row that a request selects in the last 3/4 of its steps, the rows used since.

    A row is in S slots if fewer than S others were used after it (Mattson et al., "Evaluation
    techniques for storage hierarchies", 1970, section 3). Tokens that were generated while
    recording are on the device when they are first used.
    """
    steps, layers, _ = positions.shape
    context, found = int(positions.max()) + 1, []
    for layer in range(layers):
        order = np.empty(0, dtype=np.int32)  # used positions, longest unused first
        newest = positions[0, layer].max()
        for step in range(steps):
            chosen = positions[step, layer]
            distance = np.full(context, np.inf)
            distance[newest + 1 :] = 0
            distance[order] = np.arange(len(order))[::-1]
            if step >= steps // 4:
                found.append(distance[chosen])
            is_chosen = np.zeros(context, dtype=bool)
            is_chosen[chosen] = True
            order = np.concatenate([order[~is_chosen[order]], chosen])
    return np.concatenate(found)


def load_selections(path: Path) -> RecordedSelections:
    """Read a file of selections.

    Raises:
        PlanError: it is none, has too few steps, or no positions beyond its selections.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = [name for name in stored.files if name.startswith("gaps_")]
            found = {name: stored[name] for name in names}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "it is no archive of numpy arrays"
        raise PlanError(f"selection file {path} cannot be read: {reason}; {_WANTED}") from error
    if not found:
        raise PlanError(f"selection file {path} holds something else; {_WANTED}")
    requests = tuple(_positions(path, name, gaps) for name, gaps in found.items())
    if len({each.shape[1:] for each in requests}) > 1:
        raise PlanError(f"selection file {path} has requests of different models; {_WANTED}")
    return RecordedSelections(path, requests)


def _positions(path: Path, name: str, gaps: NDArray[Any]) -> Positions:
    """The positions of a request, from a file's array; raises what `load_selections` does."""
    if gaps.dtype != np.int32 or gaps.ndim != 3:
        raise PlanError(f"selection file {path} holds something else as {name}; {_WANTED}")
    if gaps.shape[0] < FEWEST_STEPS or 0 in gaps.shape:
        raise PlanError(
            f"selection file {path} has shape {list(gaps.shape)} as {name}; expected at least "
            f"{FEWEST_STEPS} steps, a layer and a position"
        )
    positions = np.cumsum(gaps[-MOST_STEPS:], axis=2, dtype=np.int64)
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= _MOST_POSITION:
        raise PlanError(
            f"selection file {path} has position {low if low < 0 else high}; expected 0 to "
            f"{_MOST_POSITION - 1}: record a request that is longer than a selection"
        )
    if gaps.shape[2] > 1 and int(gaps[..., 1:].min()) < 1:
        raise PlanError(f"selection file {path} has a position twice in a selection; {_WANTED}")
    return positions.astype(np.int32)
