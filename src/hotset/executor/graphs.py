"""Steps as CUDA graphs: recorded once for some sizes, then replayed instead of launched."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from hotset.attention.backend import StepAttention
from hotset.attention.batch import Batch
from hotset.attention.flashinfer.backend import FlashInferAttention, FlashInferBackend
from hotset.attention.flashinfer.recorded import StaticDecode, StaticMixed
from hotset.attention.inputs import Inputs, fill
from hotset.cost.tuning import TUNINGS
from hotset.executor.recorded_sizes import RecordedSizes, sizes_up_to

Array = npt.NDArray[np.int64]


def _seconds(graphs: Sequence[torch.cuda.CUDAGraph]) -> float:
    """How long the device takes for `graphs`, one after the other; of three times the least."""
    times: list[float] = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for graph in graphs:
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


def _end_capture_of_generators() -> None:
    """Have PyTorch's random numbers work again: a recording that failed leaves them in it."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    torch.zeros(1, device="cuda")  # PyTorch warns of a graph of nothing
    graph.capture_end()


@contextmanager
def _recording(graphs: list[torch.cuda.CUDAGraph]) -> Iterator[None]:
    """Within it graphs are recorded. The caller adds to `graphs`; the last one is open.

    An error ends the recording, so that the device can be used. Nothing is collected meanwhile, as
    what garbage gives back to the driver (pinned memory, other graphs) would break it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # it is invalid, which is why it ends
            graphs[-1].capture_end()
        with suppress(RuntimeError):
            _end_capture_of_generators()
        raise
    else:
        graphs[-1].capture_end()
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class StaticInputs:
    """Where the recorded kernels of one size read what to compute.

    Attributes:
        packed: `[5 * T + R]` int64 on the device: the rows of `Inputs`, then `rows`.
        rows: the last R of it, rows whose logits are wanted.
    """

    packed: torch.Tensor
    inputs: Inputs
    rows: torch.Tensor

    @classmethod
    def make(cls, num_tokens: int, num_rows: int, padding: Array, previous: torch.Tensor) -> Self:
        """Room for T tokens and R rows, full of `padding`, on the device of `previous`."""
        packed = previous.new_zeros(5 * num_tokens + num_rows)
        views = Inputs(*packed[: 5 * num_tokens].view(5, -1).unbind())
        static = cls(packed, views, packed[5 * num_tokens :])
        static.fill(np.empty((5, 0), np.int64), np.empty(0, np.int64), padding)
        return static

    def fill(self, inputs: Array, rows: Array, padding: Array) -> None:
        """Set the step's inputs, `[5, T or fewer]`, and rows, R or fewer; `padding` is beyond."""
        size = len(self.inputs.token_ids)
        packed = np.zeros(len(self.packed), np.int64)
        tokens = packed[: 5 * size].reshape(5, size)
        tokens[:, : inputs.shape[1]] = inputs
        tokens[:, inputs.shape[1] :] = padding[:, None]
        packed[5 * size : 5 * size + len(rows)] = rows
        fill(self.packed, packed)


@dataclass(frozen=True, slots=True)
class _DecodeGraph:
    """A step of decodes, recorded whole."""

    static: StaticInputs
    decode: StaticDecode
    graph: torch.cuda.CUDAGraph


@dataclass(frozen=True, slots=True)
class _MixedGraph:
    """Any other step, recorded whole or in parts: between two of them is the attention of a layer.

    There that runs as it is, as its kernels differ with the sequences of a step.
    """

    static: StaticInputs
    parts: list[torch.cuda.CUDAGraph]  # one more than `cuts`
    cuts: list[tuple[int, torch.Tensor, torch.Tensor]]  # layer, its queries, its output


class StepGraphs:
    """Replays recorded steps. None is recorded before `record_next` was called.

    Args:
        forward: the model's step: token ids and positions (`[T]`), attention, rows (`[R]`, or
            None for all) -> `[R, vocab]` logits.
        backend: makes the attention.
        previous: `[max_num_seqs]` int64, the tokens that the step before chose; see `Inputs`.
        max_num_tokens: most tokens of a step.
        max_context_blocks: most blocks of one sequence.
        scratch_block: a block that is never read.
        before_cut: called before the end of a recorded part, to join the copies that forked in it;
            None where nothing does.
    """

    def __init__(
        self,
        forward: Callable[
            [torch.Tensor, torch.Tensor, StepAttention, torch.Tensor | None], torch.Tensor
        ],
        backend: FlashInferBackend,
        previous: torch.Tensor,
        *,
        max_num_tokens: int,
        max_context_blocks: int,
        scratch_block: int,
        before_cut: Callable[[], None] | None,
    ) -> None:
        self._forward = forward
        self._before_cut = before_cut
        self._backend = backend
        self._previous = previous
        self._scratch_block = scratch_block
        # A token of padding: id 0 at position 0, known, its KV where it is never read.
        self._padding = np.array([0, 0, scratch_block, 0, -1], np.int64)
        self._logits: torch.Tensor | None = None
        self._buffers: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._stream = torch.cuda.Stream(previous.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._block_ids = torch.zeros(
            len(previous) * max_context_blocks, dtype=torch.int32, device=previous.device
        )
        self._max_num_seqs = min(len(previous), backend.most_recorded_seqs)
        most_decodes = min(self._max_num_seqs, max_num_tokens)
        tuning = TUNINGS[previous.device.type]  # a step is padded to the next size
        self._decode_sizes = RecordedSizes(sizes_up_to(tuning.decode_sizes, most_decodes))
        mixed_sizes = sizes_up_to(tuning.mixed_sizes, max_num_tokens)
        self._mixed_sizes = RecordedSizes(mixed_sizes)
        self._largest_mixed = mixed_sizes[-1]
        self._decodes: dict[int, _DecodeGraph] = {}
        self._mixed: dict[int, _MixedGraph] = {}
        self._attention: StaticMixed | None = None
        gc.collect()  # here, as not while recording

    @property
    def is_complete(self) -> bool:
        """Whether all sizes are recorded."""
        return not (self._decode_sizes.missing or self._mixed_sizes.missing)

    def record_next(self) -> bool:
        """Record one more size; returns False where that has to wait, for kernels of prompts.

        May be called between two steps, the first of which may still run.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return self._record_next()
        finally:
            # Also where it failed: what it has started uses the workspace of the next step.
            current.wait_stream(self._stream)

    def _record_next(self) -> bool:
        """Record one more size, on a stream of its own; see `record_next`."""
        if self._decode_sizes.missing:
            size = self._decode_sizes.missing[0]
            decode = self._decodes[size] = self._record_decode(size)
            self._decode_sizes.add(size, self._cost([decode.graph], size))
        elif self._backend.use_all_kernels(waits=False):
            size = self._mixed_sizes.missing[0]
            mixed = self._mixed[size] = self._record_mixed(size)
            if self._attention is not None:
                self._attention.plan_nothing()
            self._mixed_sizes.add(size, self._cost(mixed.parts, size))
        else:
            return False
        return True

    def _cost(self, graphs: Sequence[torch.cuda.CUDAGraph], size: int) -> float:
        """What a size is chosen by: seconds, or rows where copies are part of the step."""
        return _seconds(graphs) if self._before_cut is None else float(size)

    def run(self, batch: Batch, when_ready: Callable[[], None]) -> torch.Tensor | None:
        """Compute a step; `when_ready` is called when its inputs and plan were submitted.

        Returns:
            `[R, vocab]` logits of the batch's sampled rows, good until the next call; None where
            no recorded step fits, with nothing computed.
        """
        num_rows = len(batch.sampled_rows)
        if batch.is_decode and (size := self._decode_sizes.find(num_rows)) is not None:
            decode = self._decodes[size]
            decode.static.fill(batch.inputs, batch.sampled_rows[:0], self._padding)
            decode.decode.plan(batch.sequences)
            when_ready()
            decode.graph.replay()
        elif (size := self._mixed_sizes.find(batch.num_tokens)) is not None and self._holds(batch):
            mixed = self._mixed[size]
            mixed.static.fill(batch.inputs, batch.sampled_rows, self._padding)
            (self._attention or self._backend).plan(batch)
            when_ready()
            for part, (layer, query, output) in zip(mixed.parts, mixed.cuts, strict=False):
                part.replay()
                self._backend.run(layer, query, output)
            mixed.parts[-1].replay()
        else:
            return None
        assert self._logits is not None
        return self._logits[:num_rows]

    def _holds(self, batch: Batch) -> bool:
        """Whether the attention of steps with prompts has room for all sequences."""
        return self._attention is None or self._attention.holds(batch)

    def _record_decode(self, size: int) -> _DecodeGraph:
        static = StaticInputs.make(size, 0, self._padding, self._previous)
        decode = StaticDecode(
            self._backend,
            static.inputs,
            block_ids=self._block_ids,
            scratch_block=self._scratch_block,
        )
        decode.plan([])
        self._step(static, decode.attention)  # compiles, and loads kernels
        torch.cuda.synchronize()
        graphs: list[torch.cuda.CUDAGraph] = []
        with _recording(graphs):
            self._begin(graphs)
            self._step(static, decode.attention)
        return _DecodeGraph(static, decode, graphs[0])

    def _record_mixed(self, size: int) -> _MixedGraph:
        num_rows = min(size, len(self._previous))
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
                parts[-1].capture_end()
                cuts.append((layer, query_at, output_at))
                self._begin(parts)
            return output_at

        run = cut
        if self._backend.can_record_prompts:
            self._attention = self._attention or self._make_attention()
            self._attention.begin(size)
            run = self._attention.run
        attention = FlashInferAttention(self._backend, static.inputs, run)
        self._step(static, attention)  # compiles, and loads kernels
        torch.cuda.synchronize()
        with _recording(parts):
            self._begin(parts)
            self._step(static, attention)
        return _MixedGraph(static, parts, cuts)

    def _make_attention(self) -> StaticMixed:
        return StaticMixed(
            self._backend,
            max_num_seqs=self._max_num_seqs,
            max_num_tokens=self._largest_mixed,
            block_ids=self._block_ids,
            scratch_block=self._scratch_block,
        )

    def _begin(self, graphs: list[torch.cuda.CUDAGraph]) -> None:
        graphs.append(torch.cuda.CUDAGraph())
        # Other threads may pin host memory meanwhile.
        graphs[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _step(self, static: StaticInputs, attention: StepAttention) -> None:
        inputs = static.inputs
        rows = static.rows if len(static.rows) else None
        token_ids = inputs.resolve(self._previous)
        logits = self._forward(token_ids, inputs.positions, attention, rows)
        if self._logits is None:
            self._logits = logits.new_zeros(len(self._previous), logits.shape[1])
        self._logits[: len(logits)].copy_(logits)

    def _buffers_for(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and output of all layers and sizes with the heads of `query`, `[T, H, D]`."""
        num_tokens, *shape = query.shape
        heads = (shape[0], shape[1])
        if heads not in self._buffers:
            query_at = query.new_zeros(self._largest_mixed, *heads)
            self._buffers[heads] = (query_at, torch.zeros_like(query_at))
        query_at, output_at = self._buffers[heads]
        return query_at[:num_tokens], output_at[:num_tokens]
