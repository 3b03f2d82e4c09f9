"""Which tokens decodes select, noted where attention selects them.

It is done on the device, by copies to fixed places, so that a CUDA graph can record them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hotset.attention.batch import Batch
from hotset.attention.spec import LayerAttention

MOST_STEPS = 512  # of a request
_MOST_REQUESTS = 8
_MOST_BYTES = 2**28  # on the host


class SelectionRecorder:
    """Notes the selections of the first requests that decode, 256 MiB at most.

    Give it to the backend before steps are recorded as graphs.

    Args:
        layers: what each asks for; they have indexers.
        num_rows: most decodes of a step.
        device: that computes.

    Attributes:
        count: K, tokens that a layer selects.
        is_on: whether steps are noted.
    """

    def __init__(
        self, layers: Sequence[LayerAttention], *, num_rows: int, device: torch.device
    ) -> None:
        assert layers[0].indexer is not None
        self.count = layers[0].indexer.top_k
        self.is_on = False
        selecting = [i for i, layer in enumerate(layers) if layer.index_dim]
        self._numbers = {layer: number for number, layer in enumerate(selecting)}
        shape = (len(selecting), num_rows, self.count)
        self._positions = torch.zeros(shape, dtype=torch.int32, device=device)
        step_bytes = 4 * len(selecting) * self.count
        self._most_steps = max(1, min(MOST_STEPS, _MOST_BYTES // step_bytes))
        most_requests = _MOST_BYTES // (step_bytes * self._most_steps)
        self._most_requests = max(1, min(_MOST_REQUESTS, most_requests))
        self._found: dict[int, list[NDArray[np.int32]]] = {}

    def note(self, layer: int, positions: torch.Tensor, first_row: int) -> None:
        """A layer has selected for the rows of a step from `first_row` on.

        Args:
            layer: that selects.
            positions: `[T, K]` int32, -1 beyond what a row sees.
            first_row: of the flat batch; rows of prompts come after those of all decodes.
        """
        rows = self._positions[self._numbers[layer], first_row : first_row + len(positions)]
        rows.copy_(positions[: len(rows)])

    def end_step(self, batch: Batch, sequence_ids: Sequence[int]) -> None:
        """Keep what decodes of a step selected; waits for the device.

        Args:
            batch: the step.
            sequence_ids: of `batch.sampled_rows`, in their order.
        """
        if not self.is_on:
            return
        rows = {}
        for row, sequence_id in zip(batch.sampled_rows.tolist(), sequence_ids, strict=True):
            if row >= batch.num_decodes or batch.sequences[row].context_len <= self.count:
                continue
            if sequence_id in self._found or len(self._found) < self._most_requests:
                steps = self._found.setdefault(sequence_id, [])
                if len(steps) < self._most_steps:
                    rows[row] = steps
        if not rows:
            return
        index = torch.tensor(list(rows), device=self._positions.device)
        noted = self._positions.index_select(1, index).cpu().numpy()  # [layers, rows, K]
        for number, steps in enumerate(rows.values()):
            steps.append(noted[:, number].copy())

    def requests(self) -> list[NDArray[np.int32]]:
        """Of each request `[steps, layers, K]` positions, ascending."""
        return [np.stack(steps) for steps in self._found.values() if steps]
