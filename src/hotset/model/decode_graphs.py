"""Decode steps as CUDA graphs, one for each of some batch sizes."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hotset.model.attention import Attention
from hotset.model.batch import Batch, Inputs, to_device
from hotset.model.flashinfer_attention import FlashInferBackend, StaticDecode

_FIRST_SIZES = (1, 2, 4, 8, 16, 24, 32)
_SIZE_STEP = 32


def graph_sizes(max_batch: int) -> list[int]:
    """Batch sizes to record: a step is padded to the next one."""
    sizes = {*_FIRST_SIZES, *range(64, max_batch, _SIZE_STEP), max_batch}
    return sorted(size for size in sizes if size <= max_batch)


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor  # [5, B], the rows of `Inputs`
    decode: StaticDecode


class DecodeGraphs:
    """Replays a recorded decode step instead of launching its kernels one by one.

    Args:
        forward: the model's step: token ids and positions (`[B]`), attention -> `[B, vocab]`.
        backend: makes the attention.
        previous: `[max_batch]` int64, the tokens that the step before chose; see `Inputs`.
        max_context_blocks: most blocks of one sequence.
        scratch_block: a block that nobody reads.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor, torch.Tensor, Attention], torch.Tensor],
        backend: FlashInferBackend,
        previous: torch.Tensor,
        *,
        max_context_blocks: int,
        scratch_block: int,
    ) -> None:
        self._scratch_block = scratch_block
        self._device = previous.device
        self._graphs: list[_Graph] = []
        self._sizes = graph_sizes(len(previous))
        self._logits: torch.Tensor | None = None
        block_ids = torch.zeros(
            len(previous) * max_context_blocks, dtype=torch.int32, device=self._device
        )
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):  # the largest first: the others reuse its memory
            inputs = torch.from_numpy(self._padding(size)).to(self._device)
            views = Inputs(*inputs.unbind())
            decode = StaticDecode(backend, views, block_ids=block_ids, scratch_block=scratch_block)
            decode.plan([])

            def step(views: Inputs = views, attention: Attention = decode.attention) -> None:
                logits = forward(views.resolve(previous), views.positions, attention)
                if self._logits is None:
                    self._logits = torch.empty_like(logits)
                self._logits[: len(logits)].copy_(logits)

            step()  # compiles, and loads kernels
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step()
            self._graphs.insert(0, _Graph(graph, inputs, decode))

    @property
    def max_batch(self) -> int:
        """Most sequences of a step."""
        return self._sizes[-1]

    def run(self, batch: Batch) -> torch.Tensor:
        """Compute a step of decodes; `[R, vocab]` logits that are good until the next call."""
        num_rows = len(batch.sequences)
        graph = self._graphs[bisect.bisect_left(self._sizes, num_rows)]
        padded = self._padding(graph.inputs.shape[1])
        padded[:, :num_rows] = batch.inputs
        graph.inputs.copy_(to_device(padded, self._device))
        graph.decode.plan(batch.sequences)
        graph.graph.replay()
        assert self._logits is not None
        return self._logits[:num_rows]

    def _padding(self, size: int) -> np.ndarray:
        """`[5, size]` inputs of rows that compute nothing of use."""
        columns = np.array([0, 0, self._scratch_block, 0, -1], np.int64)
        return np.repeat(columns[:, None], size, axis=1)
