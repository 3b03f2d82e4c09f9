"""FlashInfer over latents on the CPU: wrappers that attend as they are planned, as on a GPU."""

import math
from collections.abc import Sequence

import torch
from fake_flashinfer import do

from hotset.attention.flashinfer.expanded import ExpandedKernels, ExpandedPrompts
from hotset.attention.flashinfer.latent import LatentBackend
from hotset.attention.spec import LayerAttention
from hotset.memory.arena import DeviceArena

LOG2_E = math.log2(math.e)


class _Latents:
    """FlashInfer's wrapper for latents: what it plans lies at fixed places, but for the blocks."""

    MOST_WORKS = 16384

    def __init__(self, workspace: torch.Tensor, backend: str) -> None:
        assert backend == "fa3"
        self._planned = torch.zeros(3, self.MOST_WORKS, dtype=torch.int32)
        self._num_rows = torch.zeros(1, dtype=torch.int32)

    def plan(
        self,
        query_starts: torch.Tensor,
        block_starts: torch.Tensor,
        block_ids: torch.Tensor,
        lens: torch.Tensor,
        num_heads: int,
        rank: int,
        rope_dim: int,
        block_size: int,
        causal: bool,
        scaling: float,
        *dtypes: torch.dtype,
    ) -> None:
        tables = (query_starts, block_starts, block_ids, lens)
        assert all(table.dtype == torch.int32 for table in tables)
        assert len(query_starts) == len(block_starts) == len(lens) + 1 > 1
        self._num_rows[0] = len(lens)
        for place, table in zip(self._planned, (query_starts, block_starts, lens), strict=True):
            place[: len(table)] = table
        self._block_ids, self._block_size = block_ids, block_size
        self._scaling, self._causal = scaling, causal
        self._shape = (num_heads, rank, rope_dim)

    def run(
        self,
        query: torch.Tensor,
        query_rotary: torch.Tensor,
        latents: torch.Tensor,
        rotary: torch.Tensor,
        *,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        return_lse_base_on_e: bool = False,
    ) -> None:
        """Attend from `[T, H, R]` and `[T, H, P]`; what is recorded reads the plan when replayed.

        As the kernel does, a recording keeps the place of the blocks, and of nothing else.
        """
        block_ids = self._block_ids
        assert return_lse == return_lse_base_on_e == (lse is not None)
        assert (query.shape[1], query.shape[2], query_rotary.shape[2]) == self._shape
        assert query.stride(-1) == query_rotary.stride(-1) == latents.stride(-1) == 1
        assert latents.shape[1] == self._block_size and out.shape == query.shape

        def attend() -> None:
            starts, block_starts, lens = (row.tolist() for row in self._planned)
            for row in range(int(self._num_rows)):
                first, end = starts[row : row + 2]
                assert end == first + 1 and not self._causal
                num_blocks = -(-lens[row] // self._block_size)
                blocks = block_ids[block_starts[row] : block_starts[row] + num_blocks].long()
                kept = latents[blocks].flatten(0, 1)[: lens[row]].float()
                kept_rotary = rotary[blocks].flatten(0, 1)[: lens[row]].float()
                scores = query[first].float() @ kept.T + query_rotary[first].float() @ kept_rotary.T
                out[first] = ((scores * self._scaling).softmax(-1) @ kept).to(out.dtype)
                if lse is not None:
                    lse[first] = (scores * self._scaling).logsumexp(-1)

        do(attend)


class _Ragged:
    """FlashInfer's wrapper over keys and values one after another: one sequence at a time here."""

    def __init__(self, workspace: torch.Tensor, layout: str, *, backend: str) -> None:
        assert layout == "NHD" and backend == "fa3"

    def plan(
        self,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        *shape: int,
        causal: bool,
        sm_scale: float,
        **dtypes: torch.dtype,
    ) -> None:
        self._sizes = query_starts.tolist()[1], key_starts.tolist()[1]
        self._shape, self._causal, self._scaling = shape, causal, sm_scale

    def run(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        out: torch.Tensor,
        lse: torch.Tensor,
        return_lse: bool,
    ) -> None:
        assert return_lse and (len(query), len(keys)) == self._sizes and len(values) == len(keys)
        assert (query.shape[1], keys.shape[1], keys.shape[2], values.shape[2]) == self._shape
        assert (
            query.is_contiguous()
            and out.is_contiguous()
            and keys.stride(-1) == values.stride(-1) == 1
        )
        scores = torch.einsum("qhd,shd->qhs", query.float(), keys.float()) * self._scaling
        if self._causal:
            ends = torch.arange(len(query))[:, None] + len(keys) - len(query)
            behind = ends < torch.arange(len(keys))
            scores = scores.masked_fill(behind[:, None], -torch.inf)
        out.copy_(torch.einsum("qhs,shv->qhv", scores.softmax(-1), values.float()))
        lse.copy_(scores.logsumexp(-1) * LOG2_E)


def _merge_states(
    output: torch.Tensor, sums: torch.Tensor, other: torch.Tensor, other_sums: torch.Tensor
) -> None:
    both = torch.stack([sums, other_sums]) / LOG2_E
    weights = both.softmax(0).unsqueeze(-1)
    output.copy_(output * weights[0] + other * weights[1])
    sums.copy_(both.logsumexp(0) * LOG2_E)


def _gather_latents(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    first: int,
    latents: torch.Tensor,
    made: torch.Tensor,
) -> None:
    rank = latents.shape[1]
    rows = cache[block_table.long()].flatten(0, 1)[first : first + len(latents)]
    latents.copy_(rows[:, :rank])
    made[..., : rows.shape[1] - rank] = rows[:, None, rank:]


def _store_latent(
    latent: torch.Tensor,
    rotary: torch.Tensor,
    cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    cache[blocks, offsets] = torch.cat((latent, rotary), dim=-1)


class CpuLatents(LatentBackend):
    """`LatentBackend` over fakes.

    Args:
        most_rows: what a plan has room for.
        expands: whether the kernel for long prompts is there.
        piece_tokens: most tokens of a piece.
    """

    def __init__(
        self,
        arena: DeviceArena,
        layers: Sequence[LayerAttention],
        *,
        most_rows: int = 256,
        expands: bool = False,
        piece_tokens: int = 64,
    ) -> None:
        self.store_latent = _store_latent
        self._wrapper_class, self._kernels = _Latents, None
        self._set_up(arena, layers, workspace_bytes=1)
        self._most_rows = most_rows
        self.expanded = ExpandedPrompts(
            ExpandedKernels(_Ragged, _gather_latents, _merge_states),
            self._workspace,
            layers[0],
            piece_tokens=piece_tokens,
        )
        self._expands = expands

    def wait_for_plan(self) -> None:
        """There is nothing to wait for."""

    def note_plan(self) -> None:
        """There is nothing to wait for."""
