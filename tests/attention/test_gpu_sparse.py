"""Sparse attention on an NVIDIA GPU of the kind Hopper: run these there with `pytest -m gpu`.

An engine with it: `test_gpu_latent`.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from paged import check_on_a_gpu, difference
from test_gpu_latent import BLOCK, DECODES, DEVICE, MIXED, Step
from tiny_models import SPARSE_FAMILIES, WIDE_SPARSE, make_model

from hotset.attention.flashinfer.latent_rows import make_rows
from hotset.attention.flashinfer.sparse import SparseBackend
from hotset.attention.gather import GatherBackend
from hotset.attention.inputs import Inputs
from hotset.attention.latent import LatentWeights
from hotset.attention.sparse.indexer import Index
from hotset.attention.sparse.rounded import store_keys
from hotset.attention.sparse.select import select_positions
from hotset.cost.attention import Indexer
from hotset.linear.fp8 import FP8
from hotset.memory.arena import DeviceArena

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

COUNT, INDEX_HEADS, INDEX_DIM, MOST_CONTEXT = 256, 64, 128, 9100
# Each (context before, tokens of the step): decodes around COUNT, and prompts that grow past it.
AROUND = [(254, 1), (255, 1), (256, 1), (0, 260), (250, 12)]


@pytest.mark.parametrize("count", [16, 256, 2048])
@pytest.mark.parametrize("width", [2048, 4100, 36864])
def test_flashinfer_selects_as_the_reference_does_ties_to_the_lower_position(
    count: int, width: int
) -> None:
    from flashinfer import top_k_ragged_transform

    torch.manual_seed(0)
    lengths = [0, 1, 15, 16, 17, 255, 256, 257, 2047, 2048, 2049, 4096, 36863, 36864]
    lens = torch.tensor([n for n in lengths if n <= width], dtype=torch.int32, device=DEVICE)
    for values in (3, 50, 10_000_000):  # from ties nearly everywhere to hardly any
        scores = torch.randint(-values, values, (len(lens), width), device=DEVICE).float()
        got = top_k_ragged_transform(
            scores, torch.zeros_like(lens), lens, count, deterministic=True, tie_break=1
        )
        assert torch.equal(got, select_positions(scores, lens, count))


class SparseStep(Step):
    """Two layers, of which the second takes the selection of the first.

    Index values are small integers, so that scores are exact, and equal ones many.
    """

    def __init__(
        self,
        num_heads: int,
        lengths: list[tuple[int, int]],
        *,
        has_sinks: bool = False,
        index_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, lengths, torch.bfloat16)
        self.index_dtype = index_dtype
        sinks = torch.randn(num_heads, device=DEVICE) if has_sinks else None
        full = Indexer(COUNT, INDEX_HEADS, INDEX_DIM)
        self.layers = [
            replace(layer, indexer=replace(full, is_shared=i == 1), sinks=sinks)
            for i, layer in enumerate(self.layers)
        ]
        self.arena = self.make_arena(torch.bfloat16, torch.device(DEVICE))
        self.arena.storage.normal_()
        self.fill_keys()
        self.index = Index(
            self.integers(1, self.num_tokens, INDEX_HEADS, INDEX_DIM).bfloat16(),
            self.integers(1, self.num_tokens, INDEX_DIM).bfloat16(),
            self.integers(1, self.num_tokens, INDEX_HEADS) / 8,
        )

    def fill_keys(self) -> None:
        """Those of earlier tokens; of 8 bits they are turned and rounded integers."""
        keys, scales = self.arena.index_keys[0], self.arena.index_scales[0]
        values = self.integers(*keys.shape)
        if scales is None:
            keys.copy_(values)
            return
        slots = torch.arange(self.arena.num_blocks * BLOCK, device=DEVICE)
        own = values.flatten(0, 1)[: len(slots)]
        store_keys(own, keys, scales, (slots // BLOCK, slots % BLOCK))

    @staticmethod
    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, device=DEVICE).float()

    def make_arena(self, dtype: torch.dtype, device: torch.device) -> DeviceArena:
        return DeviceArena(
            [layer.cache for layer in self.layers],
            num_blocks=self.arena.num_blocks,
            block_size=BLOCK,
            dtype=dtype,
            device=device,
            index_dims=[layer.index_dim for layer in self.layers],
            index_dtype=self.index_dtype,
        )

    def attend(self, attention: Any) -> list[torch.Tensor]:
        """What both layers attend to, one after another."""
        given = (self.query, self.rotary, self.latent, self.index)
        return [attention.attend(layer, *given) for layer in (0, 1)]

    def exact_layers(self) -> list[torch.Tensor]:
        """By float32 over gathered rows, on the CPU."""
        weights = LatentWeights(self.heads.float().cpu(), nope_dim=128)
        wide = [
            replace(
                one,
                dtype=torch.float32,
                latent=weights,
                sinks=None if one.sinks is None else one.sinks.cpu(),
            )
            for one in self.layers
        ]
        arena = self.make_arena(torch.float32, torch.device("cpu"))
        arena.storage.copy_(self.arena.storage)
        n = arena.num_blocks
        for own, other in (
            (arena.index_keys[0], self.arena.index_keys[0]),
            (arena.index_scales[0], self.arena.index_scales[0]),
        ):
            if own is not None and other is not None:
                own.view(torch.uint8)[:n] = other[:n].to(own.dtype).view(torch.uint8).cpu()
        inputs = Inputs(*(row.cpu() for row in self.inputs()))
        attention = GatherBackend(arena, wide).begin_step(self.batch, inputs)
        given = [part.float().cpu() for part in (self.query, self.rotary, self.latent)]
        index = Index(*(part.float().cpu() for part in self.index[:3]))
        return [attention.attend(layer, *given, index) for layer in (0, 1)]


def backend_of(step: SparseStep) -> SparseBackend:
    return SparseBackend(step.arena, step.layers, max_context=MOST_CONTEXT)


@pytest.mark.parametrize("num_heads", [16, 64, 128])
@pytest.mark.parametrize("lengths", [DECODES, MIXED, AROUND], ids=["decodes", "mixed", "around"])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("index_dtype", [None, FP8])
def test_attention_to_what_was_selected_is_that_in_float32(
    num_heads: int,
    lengths: list[tuple[int, int]],
    has_sinks: bool,
    index_dtype: torch.dtype | None,
) -> None:
    step = SparseStep(num_heads, lengths, has_sinks=has_sinks, index_dtype=index_dtype)
    expected = step.exact_layers()

    got = step.attend(backend_of(step).begin_step(step.batch, step.inputs()))

    for one, other in zip(expected, got, strict=True):
        for seq in step.sequences:
            rows = slice(seq.start, seq.start + seq.num_tokens)
            assert difference(one[rows], other[rows].float().cpu()) < 1e-2, seq.context_len


@pytest.mark.parametrize("lengths", [AROUND, MIXED], ids=["around", "mixed"])
def test_each_token_lists_rows_once_and_none_beyond_its_length(
    lengths: list[tuple[int, int]],
) -> None:
    step = SparseStep(64, lengths)
    backend = backend_of(step)
    step.attend(backend.begin_step(step.batch, step.inputs()))  # stores the step's keys
    rows = make_rows(step.sequences)
    launched, _ = backend._launched_step(rows)
    launched.rows.fill_(12345)

    backend._select(launched, 0, step.index)

    for found, length in zip(launched.rows.tolist(), rows.lens.tolist(), strict=True):
        kept = found[: min(length, COUNT)]
        assert min(kept) >= 0 and len(set(kept)) == len(kept)
        assert found[len(kept) :] == [-1] * (COUNT - len(kept))


def test_scores_in_pieces_select_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    step = SparseStep(64, MIXED)
    backend = backend_of(step)
    expected = step.attend(backend.begin_step(step.batch, step.inputs()))
    monkeypatch.setattr(backend, "_most_scored", 100)
    got = step.attend(backend.begin_step(step.batch, step.inputs()))
    assert all(map(torch.equal, expected, got))


@pytest.mark.parametrize("num_heads", [64, 128])
@pytest.mark.parametrize(("has_sinks", "index_dtype"), [(False, None), (True, None), (False, FP8)])
def test_replayed_attention_is_the_launched_one_bit_for_bit(
    num_heads: int, has_sinks: bool, index_dtype: torch.dtype | None
) -> None:
    step = SparseStep(num_heads, MIXED, has_sinks=has_sinks, index_dtype=index_dtype)
    backend = backend_of(step)
    recorded = backend.record_mixed(
        max_num_seqs=len(MIXED),
        max_num_tokens=step.num_tokens,
        block_ids=torch.zeros(10_000, dtype=torch.int32, device=DEVICE),
        scratch_block=step.scratch_block,
    )
    inputs = step.inputs()
    recorded.begin(step.num_tokens)
    attention = backend.step_with(inputs, recorded.run)
    step.attend(attention)  # loads kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step.attend(attention)
    for _ in range(3):
        step.query.normal_()
        step.index.query.copy_(step.integers(*step.index.query.shape))
        launched = backend.begin_step(step.batch, inputs)
        expected = [output.clone() for output in step.attend(launched)]
        recorded.plan(step.batch)
        graph.replay()
        assert all(map(torch.equal, outputs, expected))


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_a_model_computes_launched_and_recorded_what_gathered_rows_give(family: str) -> None:
    check_on_a_gpu(
        make_model(family, **WIDE_SPARSE),
        lambda layout, arena: SparseBackend(arena, layout.layers, max_context=60),
        # A token that is selected in place of one with nearly its score counts as rounding.
        lambda rounding: max(5e-2, 3 * rounding),
    )
