"""The device's tables of hot requests, and the rows that a step needs of them."""

from collections.abc import Sequence

import numpy as np
import torch

from hotset.attention.inputs import to_device
from hotset.kernels import hot_reference
from hotset.kernels.hot_reference import LayerSeats, Misses, Total
from hotset.kv.seats import SeatUpdates

_MOST_SLOTS = 2**15


class SeatTables:
    """What `kv.seats.Seats` decides, where kernels read it. See `LayerSeats` for the tables.

    Tables change on the compute stream alone: `apply` between two steps, `resolve` within one.

    Args:
        num_seats: B.
        num_slots: S, of a seat.
        rows_per_token: device rows from one token to the next, for each layer that selects tokens:
            its own and those of the layers that use its selection.
        max_num_tokens: of a request.
        block_size: tokens of a block.
        rows_per_block: device rows from one block to the next.
        device: where they are.

    Raises:
        torch.OutOfMemoryError: they do not fit there.
    """

    def __init__(
        self,
        *,
        num_seats: int,
        num_slots: int,
        rows_per_token: Sequence[int],
        max_num_tokens: int,
        block_size: int,
        rows_per_block: int,
        device: torch.device,
    ) -> None:
        assert num_slots <= _MOST_SLOTS, "a slot's number has 16 bits"
        self.num_seats = num_seats
        self._block_size, self._rows_per_block = block_size, rows_per_block
        self._rows_per_token, num_selections = rows_per_token, len(rows_per_token)

        def table(fill: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        num_blocks = -(-max_num_tokens // block_size)
        self._host = table(-1, torch.int32, num_seats, num_blocks)
        self._slot_blocks = table(0, torch.int32, num_seats, num_slots // block_size)
        self._token_in = table(-1, torch.int32, num_selections, num_seats, num_slots)
        self._order = table(0, torch.int16, num_selections, num_seats, num_slots)
        self._slots = torch.arange(num_slots, dtype=torch.int16, device=device)
        self._ahead = table(0, torch.int32, num_selections, num_seats, 2)
        self._totals = table(0, torch.int64, num_selections, num_seats, len(Total))
        rank_of = table(-1, torch.int16, num_seats, num_blocks * block_size)
        spare = table(0, torch.int16, num_seats, num_slots)
        self._layers = [
            LayerSeats(self._host, self._slot_blocks, token_in, order, rank_of, spare, *counted)
            for token_in, order, *counted in zip(
                self._token_in, self._order, self._ahead, self._totals, strict=True
            )
        ]
        self._resolve = hot_reference.resolve
        if device.type == "cuda":
            from hotset.kernels.resolve_rows import resolve_rows

            self._resolve = resolve_rows

    @property
    def totals(self) -> torch.Tensor:
        """`[selections, 5]` int64 on the device; see `Total`, of all seats together."""
        return self._totals.sum(1)

    def apply(self, updates: SeatUpdates) -> None:
        """Write what changed before a step. Nobody waits for it."""
        resets, places = updates.resets, updates.places
        if not resets and not places:
            return
        size = 1 + 2 * self._slot_blocks.shape[1]
        rows = [
            (seat, *(part.block for part in parts), *(_start(part.start) for part in parts))
            for seat, parts in resets
        ]
        packed = np.concatenate(
            [np.array(rows, np.int64).ravel(), np.array(places, np.int64).reshape(-1, 3).T.ravel()]
        )
        on_device = to_device(packed, self._host.device)
        if resets:
            self._reset(on_device[: len(resets) * size].view(-1, size))
        if places:
            seats, indices, slots = on_device[len(resets) * size :].view(3, -1).unbind()
            self._host[seats, indices] = slots.int()

    def _reset(self, rows: torch.Tensor) -> None:
        """`rows` are `[n, 1 + 2 * blocks]`: seats, slots' blocks, and positions that those hold."""
        num_blocks = self._slot_blocks.shape[1]
        seats, blocks, starts = rows.split([1, num_blocks, num_blocks], dim=1)
        seats = seats[:, 0]
        offsets = self._slots[: self._block_size]
        positions = torch.where(starts[..., None] < 0, -1, starts[..., None] + offsets)
        self._host[seats] = -1
        self._slot_blocks[seats] = blocks.int()
        self._token_in[:, seats] = positions.flatten(1).int()
        self._order[:, seats] = self._slots
        self._ahead[:, seats] = 0

    def resolve(
        self,
        selection: int,
        positions: torch.Tensor,
        rows: torch.Tensor,
        seats: torch.Tensor,
        *,
        is_guess: bool = False,
    ) -> Misses:
        """Complete the `rows` of hot requests, in place; see `resolve_rows`.

        Args:
            selection: which of the layers that select.
            positions: `[T, K]` int32, what it selected.
            rows: `[T, K]` int32, where that is resident.
            seats: `[T]`, of each token's request; -1 where it is not hot.
            is_guess: whether it is what the layer is guessed to select.
        """
        return self._resolve(
            positions,
            rows,
            seats,
            self._layers[selection],
            block_size=self._block_size,
            rows_per_block=self._rows_per_block,
            rows_per_token=self._rows_per_token[selection],
            is_guess=is_guess,
        )


def _start(position: int | None) -> int:
    return -1 if position is None else position
