"""Steps as CUDA graphs: recorded once for some sizes, then replayed instead of launched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeAlias

import numpy as np
import torch

from hotset.attention.backend import (
    RecordableBackend,
    RecordedDecode,
    RecordedMixed,
    StepAttention,
)
from hotset.attention.batch import NUM_INPUTS, Batch
from hotset.attention.inputs import Inputs, fill
from hotset.attention.state_step import StateLayers
from hotset.cost.tuning import TUNINGS
from hotset.executor.padding import Array, packed, padding_column
from hotset.executor.recorded_sizes import RecordedStep, RecordedSteps
from hotset.executor.recording import GraphRecorder
from hotset.parallel.group import agreed

if TYPE_CHECKING:
    from hotset.attention.state_kernels import KernelStates

# Token ids and positions (`[T]`), attention, rows (`[R]`, or None for all) -> `[R, vocab]` logits.
Forward: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, StepAttention, torch.Tensor | None], torch.Tensor
]


@dataclass(frozen=True, slots=True)
class StaticInputs:
    """Where the recorded kernels of one size read what to compute.

    Attributes:
        packed: `[6 * T + R]` int64 on the device: the rows of `Inputs`, then `rows`.
        rows: the last R of it, rows whose logits are wanted.
    """

    packed: torch.Tensor
    inputs: Inputs
    rows: torch.Tensor

    @classmethod
    def make(cls, num_tokens: int, num_rows: int, padding: Array, previous: torch.Tensor) -> Self:
        """Room for T tokens and R rows, full of `padding`, on the device of `previous`."""
        memory = previous.new_zeros(NUM_INPUTS * num_tokens + num_rows)
        tokens, row_numbers = memory.split([NUM_INPUTS * num_tokens, num_rows])
        static = cls(memory, Inputs(*tokens.view(NUM_INPUTS, -1).unbind()), row_numbers)
        static.fill(np.empty((NUM_INPUTS, 0), np.int64), np.empty(0, np.int64), padding)
        return static

    def fill(self, inputs: Array, rows: Array, padding: Array) -> None:
        """Set the step's inputs, `[6, T or fewer]`, and rows, R or fewer; `padding` is beyond."""
        num_tokens, num_rows = len(self.inputs.token_ids), len(self.rows)
        values = packed(inputs, rows, padding, num_tokens=num_tokens, num_rows=num_rows)
        fill(self.packed, values)


@dataclass(frozen=True, slots=True)
class _DecodeGraph:
    """A step of decodes, recorded whole."""

    static: StaticInputs
    decode: RecordedDecode
    graph: torch.cuda.CUDAGraph
    states: "KernelStates | None"


@dataclass(frozen=True, slots=True)
class _MixedGraph:
    """Any other step, recorded whole or in parts: between two of them is the attention of a layer.

    There that runs as it is, as its kernels differ with the sequences of a step.
    """

    static: StaticInputs
    parts: list[torch.cuda.CUDAGraph]  # one more than `cuts`
    cuts: list[tuple[int, torch.Tensor, torch.Tensor]]  # layer, its queries, its output
    states: "KernelStates | None"


class StepGraphs:
    """Replays recorded steps. None is recorded before `record_next` was called.

    Args:
        forward: the model's step.
        backend: makes the attention.
        previous: `[max_num_seqs or more]` int64, the tokens that the step before chose; see
            `Inputs`.
        max_num_seqs: most sequences of a step.
        max_num_tokens: most tokens of a step.
        max_context_blocks: most blocks of one sequence.
        scratch_block: a block that is never read.
        before_cut: called before the end of a recorded part, to join the copies that forked in it;
            None where nothing does.
        states: of layers that keep some; None where none does.
        recorder: records; None makes one.
    """

    def __init__(
        self,
        forward: Forward,
        backend: RecordableBackend,
        previous: torch.Tensor,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_context_blocks: int,
        scratch_block: int,
        before_cut: Callable[[], None] | None,
        states: StateLayers | None = None,
        recorder: GraphRecorder | None = None,
    ) -> None:
        self._forward = forward
        self._before_cut = before_cut
        self._backend, self._states = backend, states
        self._previous = previous
        self._scratch_block = scratch_block
        self._padding = padding_column(scratch_block)
        self._logits: torch.Tensor | None = None
        self._buffers: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._recorder = recorder or GraphRecorder(previous.device)
        self._block_ids = torch.zeros(
            max_num_seqs * max_context_blocks, dtype=torch.int32, device=previous.device
        )
        self._most_rows = max_num_seqs
        self._max_num_seqs = min(max_num_seqs, backend.most_recorded_seqs)
        tuning = TUNINGS[previous.device.type]  # a step is padded to the next size
        self._steps = RecordedSteps(
            tuning.decode_sizes,
            tuning.mixed_sizes,
            most_seqs=self._max_num_seqs,
            most_tokens=max_num_tokens,
        )
        self._decodes: dict[int, _DecodeGraph] = {}
        self._mixed: dict[int, _MixedGraph] = {}
        self._attention: RecordedMixed | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all sizes are recorded."""
        return self._steps.next_missing is None

    def record_next(self) -> bool:
        """Record one more size; returns False where that has to wait, for kernels of prompts.

        May be called between two steps, the first of which may still run.
        """
        with self._recorder.between_steps():
            step = self._steps.next_missing
            assert step is not None
            if not step.is_decode and not self._backend.use_all_kernels(waits=False):
                return False
            self._steps.add(step, self._record(step))
        return True

    def _record(self, step: RecordedStep) -> float:
        """Record it; returns what its size is chosen by.

        That is seconds, or rows where copies are part of the step.
        """
        graphs: Sequence[torch.cuda.CUDAGraph]
        if step.is_decode:
            decode = self._decodes[step.size] = self._record_decode(step.size)
            graphs = [decode.graph]
        else:
            mixed = self._mixed[step.size] = self._record_mixed(step.size)
            graphs = mixed.parts
            if self._attention is not None:
                self._attention.plan_nothing()
        if self._before_cut is not None:
            return float(step.size)
        return agreed(self._recorder.seconds(graphs))  # or ranks would run steps of other sizes

    def run(
        self, batch: Batch, when_ready: Callable[[], None], *, is_decode: bool
    ) -> torch.Tensor | None:
        """Compute a step; `when_ready` is called when its inputs and plan were submitted.

        One of decodes may be run as another one is, with `is_decode` false.

        Returns:
            `[R, vocab]` logits of the batch's sampled rows, good until the next call; None where
            no recorded step fits, with nothing computed.
        """
        step = self._steps.find(
            batch.num_tokens, is_decode=is_decode, is_held=lambda: self.holds(batch)
        )
        if step is None:
            return None
        recorded = self._decodes[step.size] if step.is_decode else self._mixed[step.size]
        states = recorded.states
        if states is not None and not states.fill(batch):
            return None
        if isinstance(recorded, _DecodeGraph):
            self._run_decode(recorded, batch, when_ready)
        else:
            self._run_mixed(recorded, batch, when_ready)
        if states is not None:
            states.finish()
        assert self._logits is not None
        return self._logits[: len(batch.sampled_rows)]

    def _run_decode(
        self, decode: _DecodeGraph, batch: Batch, when_ready: Callable[[], None]
    ) -> None:
        decode.static.fill(batch.inputs, batch.sampled_rows[:0], self._padding)
        decode.decode.plan(batch.sequences)
        when_ready()
        decode.graph.replay()

    def _run_mixed(self, mixed: _MixedGraph, batch: Batch, when_ready: Callable[[], None]) -> None:
        mixed.static.fill(batch.inputs, batch.sampled_rows, self._padding)
        if self._attention is not None:  # recorded with the rest
            self._attention.plan(batch)
            when_ready()
            mixed.parts[0].replay()
            return
        planned = self._backend.plan(batch)
        when_ready()
        for part, (layer, query, output) in zip(mixed.parts, mixed.cuts, strict=False):
            part.replay()
            planned.run(layer, query, output)
        mixed.parts[-1].replay()

    def close(self) -> None:
        """Give the recorded steps up; a communicator that they hold ends only then."""
        recorded = [[decode.graph] for decode in self._decodes.values()]
        recorded += [mixed.parts for mixed in self._mixed.values()]
        for graphs in recorded:
            for graph in graphs:
                graph.reset()
        self._decodes.clear()
        self._mixed.clear()

    def holds(self, batch: Batch) -> bool:
        """Whether the attention of steps with prompts has room for all sequences."""
        return self._attention is None or self._attention.holds(batch)

    def _record_decode(self, size: int) -> _DecodeGraph:
        static = StaticInputs.make(size, 0, self._padding, self._previous)
        decode = self._backend.record_decode(
            static.inputs, block_ids=self._block_ids, scratch_block=self._scratch_block
        )
        decode.plan([])
        attention, states = self._with_states(decode.attention, size, is_decode=True)
        self._step(static, attention)  # compiles, and loads kernels
        graphs: list[torch.cuda.CUDAGraph] = []
        with self._recorder.recording(graphs):
            self._step(static, attention)
        return _DecodeGraph(static, decode, graphs[0], states)

    def _record_mixed(self, size: int) -> _MixedGraph:
        num_rows = min(size, self._most_rows)
        static = StaticInputs.make(size, num_rows, self._padding, self._previous)
        parts: list[torch.cuda.CUDAGraph] = []
        cuts: list[tuple[int, torch.Tensor, torch.Tensor]] = []

        def cut(layer: int, query: torch.Tensor) -> torch.Tensor:
            """End a part with the queries in place; the next starts from the output."""
            query_at, output_at = self._buffers_for(query)
            query_at.copy_(query)
            if parts:
                if self._before_cut is not None:
                    self._before_cut()
                self._recorder.cut(parts)
                cuts.append((layer, query_at, output_at))
            return output_at

        run = cut
        if self._backend.can_record_prompts:
            self._attention = self._attention or self._make_attention()
            self._attention.begin(size)
            run = self._attention.run
        attention = self._backend.step_with(static.inputs, run)
        attention, states = self._with_states(attention, size, is_decode=False)
        self._step(static, attention)  # compiles, and loads kernels
        with self._recorder.recording(parts):
            self._step(static, attention)
        return _MixedGraph(static, parts, cuts, states)

    def _with_states(
        self, attention: StepAttention, size: int, *, is_decode: bool
    ) -> "tuple[StepAttention, KernelStates | None]":
        """What a step of `size` asks for besides attention."""
        if self._states is None:
            return attention, None
        states = self._states.record(size, self._most_rows, is_decode=is_decode)
        return self._states.around(attention, states), states

    def _make_attention(self) -> RecordedMixed:
        return self._backend.record_mixed(
            max_num_seqs=self._max_num_seqs,
            max_num_tokens=self._steps.largest_mixed,
            block_ids=self._block_ids,
            scratch_block=self._scratch_block,
        )

    def _step(self, static: StaticInputs, attention: StepAttention) -> None:
        inputs = static.inputs
        rows = static.rows if len(static.rows) else None
        token_ids = inputs.resolve(self._previous)
        logits = self._forward(token_ids, inputs.positions, attention, rows)
        if self._logits is None:
            self._logits = logits.new_zeros(self._most_rows, logits.shape[1])
        self._logits[: len(logits)].copy_(logits)

    def _buffers_for(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and output of all layers and sizes with the heads of `query`, `[T, H, D]`."""
        num_tokens, *shape = query.shape
        heads = (shape[0], shape[1])
        if heads not in self._buffers:
            query_at = query.new_zeros(self._steps.largest_mixed, *heads)
            self._buffers[heads] = (query_at, torch.zeros_like(query_at))
        query_at, output_at = self._buffers[heads]
        return query_at[:num_tokens], output_at[:num_tokens]
