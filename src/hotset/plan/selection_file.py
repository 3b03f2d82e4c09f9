"""Selections recorded from a real model, replayed for any number of slots. Imports numpy, no torch.

A file is a numpy array (`.npy`) of int32, `[steps, layers, K]`: the positions that each layer with
an indexer selected for one request in successive decode steps, in the order of selection.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hotset.errors import PlanError

FEWEST_STEPS, MOST_STEPS = 8, 512  # of more the last ones are replayed
_MOST_POSITION = 2**24
Positions = NDArray[np.int32]


def save_selections(path: Path, positions: Positions) -> None:
    """Write what `load_selections` reads: `[steps, layers, K]` int32."""
    with path.open("wb") as file:
        np.save(file, np.ascontiguousarray(positions, dtype=np.int32), allow_pickle=False)


@dataclass(frozen=True, eq=False)
class RecordedSelections:
    """Selections of one request; see the module.

    Attributes:
        path: of their file, for messages.
        positions: `[steps, layers, K]` int32.
    """

    path: Path
    positions: Positions

    @property
    def selected(self) -> int:
        """K."""
        return int(self.positions.shape[2])

    @cached_property
    def context(self) -> int:
        """Tokens of the request at the end."""
        return int(self.positions.max()) + 1

    @cached_property
    def overlap(self) -> float:
        """Share of a selection that the one of the next step has as well, mean over all."""
        steps, layers, selected = self.positions.shape
        common = 0
        for layer in range(layers):
            seen = np.full(self.context, -1)
            for step in range(steps):
                chosen = self.positions[step, layer]
                if step:
                    common += int(np.count_nonzero(seen[chosen] == step - 1))
                seen[chosen] = step
        return common / int((steps - 1) * layers * selected)

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

    @cached_property
    def _distances(self) -> tuple[NDArray[np.float64], int]:
        """Of each selected row, how many others were used since; ascending, with their samples.

        A row is in S slots if fewer than S others were used after it (Mattson et al., "Evaluation
        techniques for storage hierarchies", 1970, section 3). Tokens that were generated while
        recording are on the device when they are first used.
        """
        steps, layers, _ = self.positions.shape
        first = steps // 4
        found = []
        for layer in range(layers):
            order = np.empty(0, dtype=np.int32)  # used positions, longest unused first
            newest = self.positions[0, layer].max()
            for step in range(steps):
                chosen = self.positions[step, layer]
                distance = np.full(self.context, np.inf)
                distance[newest + 1 :] = 0
                distance[order] = np.arange(len(order))[::-1]
                if step >= first:
                    found.append(distance[chosen])
                is_chosen = np.zeros(self.context, dtype=bool)
                is_chosen[chosen] = True
                order = np.concatenate([order[~is_chosen[order]], chosen])
        return np.sort(np.concatenate(found)), (steps - first) * layers


def load_selections(path: Path) -> RecordedSelections:
    """Read a file of selections.

    Raises:
        PlanError: it is none, has too few steps, or no positions beyond its selections.
    """
    wanted = "expected int32 positions [steps, layers, K] in a .npy file"
    try:
        positions = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "it is not a numpy array"
        raise PlanError(f"selection file {path} cannot be read: {reason}; {wanted}") from error
    if not isinstance(positions, np.ndarray) or positions.dtype != np.int32 or positions.ndim != 3:
        raise PlanError(f"selection file {path} holds something else; {wanted}")
    if positions.shape[0] < FEWEST_STEPS or 0 in positions.shape:
        raise PlanError(
            f"selection file {path} has shape {list(positions.shape)}; expected at least "
            f"{FEWEST_STEPS} steps, a layer and a position"
        )
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= _MOST_POSITION:
        raise PlanError(
            f"selection file {path} has position {low if low < 0 else high}; expected 0 to "
            f"{_MOST_POSITION - 1}: record a request that is longer than a selection"
        )
    return RecordedSelections(path, positions[-MOST_STEPS:])
