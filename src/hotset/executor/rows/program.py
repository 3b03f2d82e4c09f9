"""Running a model's steps by the stages of its trace."""

from collections.abc import Sequence

import torch

from hotset.attention.backend import StepAttention
from hotset.attention.batch import Batch
from hotset.attention.inputs import Inputs
from hotset.attention.spec import LayerAttention
from hotset.executor.rows.calls import FEWEST_IN_THREADS, Calls
from hotset.executor.rows.decodes import Decodes
from hotset.executor.rows.nodes import Attend, Product, Trace, View
from hotset.executor.rows.shapes import compiled
from hotset.executor.rows.stages import Rows, Stage, make_stages
from hotset.linear import tile_product
from hotset.memory.arena import DeviceArena

_ROOM = 64  # rows


class RowProgram:
    """What a model computes in a step, as calls of compiled code.

    Args:
        trace: of the model.
        arena: where the KV is.
        layers: what each asks for.
    """

    def __init__(self, trace: Trace, arena: DeviceArena, layers: Sequence[LayerAttention]) -> None:
        self._trace, self._stages = trace, make_stages(trace)
        self._arena, self._layers = arena, layers
        self._room = 0, 0  # rows of the body, and of the tail
        self._memories: list[torch.Tensor] = []
        self._body, self._tail = Calls(), Calls()
        self._by_layer: list[tuple[int, int, Attend | None]] = []
        self._decodes: Decodes | None = None

    def logits(
        self,
        batch: Batch,
        inputs: Inputs,
        token_ids: torch.Tensor,
        attention: StepAttention,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """`[R, vocab]` logits of `rows` of `[T]` tokens; good until the next call."""
        num_tokens, num_rows = len(token_ids), len(rows)
        if num_tokens > self._room[0] or num_rows > self._room[1]:
            self._make_room(num_tokens, num_rows)
        stages = self._stages
        for embed in stages.embeds:
            ids = inputs.positions if embed.of_positions else token_ids
            self._rows_of(embed.out, num_tokens).copy_(embed.module(ids.unsqueeze(0))[0])
        if self._trace.positions is not None:
            held = self._rows_of(self._trace.positions, num_tokens).view(torch.int64)
            held[:, 0] = inputs.positions
        if self._decodes is not None and batch.num_decodes == len(batch.sequences):
            self._decodes.prepare(batch, inputs)
            self._body.run(num_tokens)
        else:
            self._run_by_layer(num_tokens, attention)
        if num_rows:
            gathered = self._rows_of(stages.gathered, num_tokens)
            torch.index_select(gathered, 0, rows, out=self._rows_of(stages.tail_input, num_rows))
            self._tail.run(num_rows)
        return self._tensor(self._trace.logits, num_rows)[0]

    def _run_by_layer(self, num_tokens: int, attention: StepAttention) -> None:
        """The body, with the attention of any step."""
        for start, stop, attend in self._by_layer:
            self._body.run(num_tokens, start, stop)
            if attend is not None:
                out = attention.attend(attend.layer, *self._asking(attend, num_tokens))
                self._rows_of(attend.out, num_tokens).copy_(out.flatten(1))

    def _make_room(self, num_tokens: int, num_rows: int) -> None:
        """Take memory for at least this number of rows, and tell all calls its addresses."""
        self._room = _rounded(num_tokens, self._room[0]), _rounded(num_rows, self._room[1])
        self._memories = []  # before more is taken
        self._memories = [
            torch.zeros(self._room[memory.is_of_tail], memory.width)
            for memory in self._stages.memories
        ]
        self._body, self._tail, self._by_layer = Calls(), Calls(), []
        self._decodes = None
        if Decodes.can_attend(self._arena, self._layers):
            self._decodes = Decodes(self._arena, self._layers, self._room[0])
        start = 0
        for stage in self._stages.body:
            if not isinstance(stage, Attend):
                self._add(self._body, stage)
                continue
            self._by_layer.append((start, len(self._body), stage))
            if self._decodes is not None:
                asking = self._asking(stage, self._room[0])
                num_heads = self._layers[stage.layer].num_heads
                out = self._rows_of(stage.out, self._room[0]).unflatten(1, (num_heads, -1))
                self._decodes.add(self._body, stage.layer, *asking, out)
            start = len(self._body)
        self._by_layer.append((start, len(self._body), None))
        for stage in self._stages.tail:
            self._add(self._tail, stage)

    def _add(self, calls: Calls, stage: Stage) -> None:
        if isinstance(stage, Product):
            x, out = self._address(stage.x), self._address(stage.out)
            arguments = tile_product.arguments(stage.tiles, 0, x, out)
            calls.add(tile_product.compiled(stage.tiles.form), arguments, 1)
        elif isinstance(stage, Rows):
            addresses = [self._address(buffer) for buffer in stage.given]
            calls.add(compiled(stage.shape), [0, 0, *addresses, 0], FEWEST_IN_THREADS)

    def _address(self, buffer: int) -> int:
        constant = self._stages.constants.get(buffer)
        return (
            self._memories[self._stages.place[buffer]].data_ptr() if constant is None else constant
        )

    def _rows_of(self, buffer: int, num_rows: int) -> torch.Tensor:
        """`[rows, width]`."""
        return self._memories[self._stages.place[buffer]][:num_rows]

    def _asking(
        self, attend: Attend, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, `[H, rows, D]` each."""
        views = attend.query, attend.key, attend.value
        query, key, value = (self._tensor(view, num_rows) for view in views)
        return query, key, value

    def _tensor(self, view: View, num_rows: int) -> torch.Tensor:
        """What a view of sizes `[A, 1, B]` is with all rows: `[A, rows, B]`."""
        rows = self._rows_of(view.buffer, num_rows)
        (first, _, last), strides = view.sizes, view.strides
        return rows.as_strided(
            (first, num_rows, last), (strides[0], rows.stride(0), strides[2]), view.offset
        )


def _rounded(wanted: int, there: int) -> int:
    """Room for some more where there is too little: a power of 2, or a multiple of `_ROOM`."""
    if wanted <= there:
        return there
    return 1 << (wanted - 1).bit_length() if wanted < _ROOM else -(-wanted // _ROOM) * _ROOM
