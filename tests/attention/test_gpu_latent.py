"""Latents on an NVIDIA GPU of the kind Hopper: run these there with `pytest -m gpu`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import make_prompts, run
from paged import check_on_a_gpu, difference
from tiny_models import WIDE, WIDE_SPARSE, make_model

from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.flashinfer.latent import LatentBackend
from hotset.attention.flashinfer.latent_steps import RecordedLatents
from hotset.attention.flashinfer.sparse import SparseBackend
from hotset.attention.gather import GatherBackend
from hotset.attention.inputs import Inputs
from hotset.attention.latent import LatentWeights
from hotset.attention.spec import LayerAttention
from hotset.engine.engine import Engine
from hotset.memory.arena import DeviceArena

MakeEngine = Callable[..., Engine]
DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

# Each (context before, tokens of the step): odd lengths, block edges, one long and one split.
DECODES = [(0, 1), (62, 1), (63, 1), (64, 1), (1000, 1), (9001, 1)]
MIXED = [*DECODES, (0, 1 + 64), (63, 7), (777, 300)]
# With prompts that attend to keys and values.
LONG = [*DECODES, (0, 65), (4000, 700), (63, 7), (2000, 2500)]
BLOCK = 64


class Step:
    """One layer's attention over random latents, in the device's 16 bits."""

    def __init__(self, num_heads: int, lengths: list[tuple[int, int]], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.heads = torch.randn(num_heads, 128 + 128, 512, device=DEVICE).to(dtype) / 16
        weights = LatentWeights(self.heads, nope_dim=128)
        spec = weights.spec(64)
        self.layers = [LayerAttention(spec, num_heads, 192**-0.5, None, dtype, latent=weights)] * 2
        table = iter(range(10_000))
        self.sequences, start = [], 0
        for past, count in lengths:
            blocks = [next(table) for _ in range(-(-(past + count) // BLOCK))]
            self.sequences.append(SequenceSpan(start, count, past + count, blocks))
            start += count
        self.num_tokens = start
        self.arena = DeviceArena(
            [spec, spec],
            num_blocks=next(table) + 1,
            block_size=BLOCK,
            dtype=dtype,
            device=torch.device(DEVICE),
        )
        self.arena.storage.normal_()
        self.query = torch.randn(num_heads, start, 192, device=DEVICE).to(dtype)
        self.rotary = torch.randn(1, start, 64, device=DEVICE).to(dtype)
        self.latent = torch.randn(1, start, 512, device=DEVICE).to(dtype)

    @property
    def scratch_block(self) -> int:
        return self.arena.num_blocks - 1

    @property
    def batch(self) -> Batch:
        columns = []
        for seq in self.sequences:
            for position in range(seq.context_len - seq.num_tokens, seq.context_len):
                block = seq.block_table[position // BLOCK]
                columns.append((0, position, block, position % BLOCK, -1, -1))
        array = torch.tensor(columns).T.numpy()
        num_decodes = sum(seq.num_tokens == 1 for seq in self.sequences)
        return Batch(array, array[0, :0], array[0, :0], self.sequences, num_decodes, False)

    def inputs(self) -> Inputs:
        return Inputs(*torch.from_numpy(self.batch.inputs).to(DEVICE).contiguous().unbind())

    def exact(self, layer: int) -> torch.Tensor:
        """By float32 over gathered rows, on the CPU."""
        wide = [
            LayerAttention(
                one.cache,
                one.num_heads,
                one.scaling,
                None,
                torch.float32,
                latent=LatentWeights(self.heads.float().cpu(), nope_dim=128),
            )
            for one in self.layers
        ]
        arena = DeviceArena(
            [one.cache for one in wide],
            num_blocks=self.arena.num_blocks,
            block_size=BLOCK,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        arena.storage.copy_(self.arena.storage)
        inputs = Inputs(*(row.cpu() for row in self.inputs()))
        attention = GatherBackend(arena, wide).begin_step(self.batch, inputs)
        given = (part.float().cpu() for part in (self.query, self.rotary, self.latent))
        return attention.attend(layer, *given)


@pytest.mark.parametrize("num_heads", [16, 20, 64, 96, 128])
@pytest.mark.parametrize("lengths", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_that_in_float32_at_odd_lengths(
    num_heads: int, lengths: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    step = Step(num_heads, lengths, dtype)
    backend = LatentBackend(step.arena, step.layers)
    expected = step.exact(1)
    attention = backend.begin_step(step.batch, step.inputs())
    got = attention.attend(1, step.query, step.rotary, step.latent).float().cpu()
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
    for seq in step.sequences:
        rows = slice(seq.start, seq.start + seq.num_tokens)
        assert difference(expected[rows], got[rows]) < bound, seq.context_len


@pytest.mark.parametrize("num_heads", [16, 20, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece_tokens", [2048, 2085, 3000, 8192])
def test_long_prompts_over_keys_and_values_are_those_in_float32(
    num_heads: int, dtype: torch.dtype, piece_tokens: int
) -> None:
    step = Step(num_heads, LONG, dtype)
    backend = LatentBackend(step.arena, step.layers)
    backend.expanded.piece_tokens = piece_tokens
    assert backend._expands
    cut = [700, *[min(piece_tokens, 2500 - first) for first in range(0, 2500, piece_tokens)]]
    assert [prompt.num_tokens for prompt in backend.long_prompts(step.batch)] == cut
    expected = step.exact(1)
    attention = backend.begin_step(step.batch, step.inputs())
    got = attention.attend(1, step.query, step.rotary, step.latent)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
    for seq in step.sequences:
        rows = slice(seq.start, seq.start + seq.num_tokens)
        assert difference(expected[rows], got[rows].float().cpu()) < bound, seq.context_len
    again = backend.begin_step(step.batch, step.inputs())
    assert torch.equal(again.attend(1, step.query, step.rotary, step.latent), got)


def test_a_step_of_several_plans_is_that_of_one() -> None:
    step = Step(16, MIXED, torch.bfloat16)
    backend = LatentBackend(step.arena, step.layers)
    given = (step.query, step.rotary, step.latent)
    expected = backend.begin_step(step.batch, step.inputs()).attend(0, *given)
    backend._most_rows = 100
    got = backend.begin_step(step.batch, step.inputs()).attend(0, *given)
    assert difference(expected.float(), got.float()) < 1e-2
    assert len(backend._wrappers) == -(-step.num_tokens // 100)


@pytest.mark.parametrize("num_heads", [16, 64, 128])
def test_replayed_attention_is_the_launched_one_bit_for_bit(num_heads: int) -> None:
    recording = Step(num_heads, MIXED, torch.bfloat16)
    backend = LatentBackend(recording.arena, recording.layers)
    size = recording.num_tokens + 37  # rows beyond the step
    recorded = RecordedLatents(
        backend,
        size,
        torch.zeros(10_000, dtype=torch.int32, device=DEVICE),
        recording.scratch_block,
    )
    query = torch.randn(num_heads, size, 576, device=DEVICE, dtype=torch.bfloat16).transpose(0, 1)
    recorded.begin(size)
    recorded.run(0, query)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = recorded.run(0, query)
    for lengths in (MIXED, DECODES, [(5, 1)], MIXED[::-1]):
        sequences, start, first = [], 0, 0
        for past, count in lengths:
            num_blocks = -(-(past + count) // BLOCK)
            table = list(range(first, first + num_blocks))
            sequences.append(SequenceSpan(start, count, past + count, table))
            start, first = start + count, first + num_blocks
        batch = Batch(*[recording.batch.inputs] * 3, sequences, 0, False)
        query.normal_()
        expected = torch.empty_like(query[:start, :, :512])
        backend.plan(batch).run(0, query[:start], expected)
        before = output[start:].clone()
        recorded.plan(batch)
        graph.replay()
        assert torch.equal(output[:start], expected)
        assert torch.equal(output[start:], before)


@pytest.mark.parametrize("family", ["deepseek_v3", "youtu"])
def test_a_model_computes_launched_and_recorded_what_sdpa_does(family: str) -> None:
    check_on_a_gpu(
        make_model(family, **WIDE),
        lambda layout, arena: LatentBackend(arena, layout.layers),
        lambda rounding: max(2e-2, 2 * rounding),
    )


@pytest.mark.parametrize(
    ("family", "wide", "backend"),
    [("youtu", WIDE, LatentBackend), ("glm_moe_dsa", WIDE_SPARSE, SparseBackend)],
    ids=["all", "selected"],
)
@pytest.mark.parametrize("tiers", [{}, {"hot_blocks": 26, "host_blocks": 300}])
def test_an_engine_answers_from_all_tiers_and_after_a_restart(
    family: str,
    wide: dict[str, Any],
    backend: type[LatentBackend],
    tiers: dict[str, Any],
    make_engine: MakeEngine,
    tmp_path: Path,
) -> None:
    """Tokens are compared where they are clear: float16 ties break as batches differ."""

    options: dict[str, Any] = {
        "device": "cuda",
        "model_dtype": torch.float16,
        "model_changes": wide,
        "kv_bytes": 2,
        "disk_mib": 64,
        "disk_path": tmp_path,
    }
    prompts = make_prompts()
    engine = make_engine(family, fetch_policy="fetch", **options, **tiers)
    if tiers:
        engine.scheduler.ahead_tokens = 1  # so that many are preempted
    assert type(engine.executor.runner._attention) is backend
    assert engine.executor.runner._graphs is not None
    first = run(engine, prompts)
    second = run(engine, prompts)
    if tiers:
        assert engine.metrics.preemptions > 0
        assert engine.metrics.cached_tokens["host"] > 0
    while engine.has_transfers:
        engine.step()
    engine.close()
    restarted = make_engine(family, fetch_policy="fetch", **options, **tiers)
    third = run(restarted, prompts)
    assert restarted.metrics.cached_tokens["disk"] > 0

    answers = [token for answer in first for token in answer]
    for other in (second, third):
        same = sum(a == b for a, b in zip(answers, [t for x in other for t in x], strict=True))
        assert same >= 0.75 * len(answers)
