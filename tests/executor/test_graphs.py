"""Recorded steps on the CPU: FlashInfer and CUDA graphs are fakes, the rest is what a GPU runs."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from fake_flashinfer import CpuFlashInfer, FakeRecorder
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import gather, paged_logits, with_sinks
from tiny_models import make_model

from hotset.attention.backend import AttentionBackend
from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.gather import GatherBackend
from hotset.attention.inputs import copy_batch
from hotset.executor import graphs as graphs_module
from hotset.executor.graphs import StepGraphs
from hotset.executor.probe import inspect_model
from hotset.linear.fp8 import FP8
from hotset.memory.arena import DeviceArena

BLOCK, MOST_TOKENS, MOST_BLOCKS = 4, 37, 9
MOST_SEQS, MOST_RECORDED = 7, 5  # of a step, and what the workspace of a recorded one holds
SCRATCH = MOST_SEQS * MOST_BLOCKS


@pytest.fixture(autouse=True)
def _tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "GraphRecorder", FakeRecorder)


@pytest.mark.parametrize(
    ("family", "has_sinks"),
    [("llama", False), ("mistral", False), ("gemma2", False), ("mistral", True)],
)
@pytest.mark.parametrize("records_prompts", [False, True])
def test_a_model_computes_launched_and_recorded_what_it_does_over_gathered_blocks(
    family: str, has_sinks: bool, records_prompts: bool
) -> None:
    model = make_model(family)
    layout = inspect_model(model)
    if has_sinks:
        layout = with_sinks(layout)

    def backend(arena: DeviceArena) -> AttentionBackend:
        return CpuFlashInfer(arena, layout.layers, records_prompts=records_prompts)

    expected = paged_logits(model, layout, gather(layout))
    for recorded in (False, True):
        got = paged_logits(model, layout, backend, recorded=recorded, compiles=False)
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("widened_blocks", "records_prompts"),
    [(0, False), (0, True), (7, False), (16, False), (16, True)],  # 7 hold some of the prompts
)
def test_an_8_bit_cache_is_attended_to_with_its_scales_also_by_a_copy_in_16_bits(
    widened_blocks: int, records_prompts: bool
) -> None:
    model = make_model("llama")
    layout = inspect_model(model, FP8)
    scales = [(0.5, 2.0), (1.0, 1.0), (3.0, 0.25)]

    def backend(arena: DeviceArena) -> AttentionBackend:
        return CpuFlashInfer(
            arena, layout.layers, records_prompts=records_prompts, widened_blocks=widened_blocks
        )

    expected = paged_logits(model, layout, gather(layout), scales=scales)
    for recorded in (False, True):
        got = paged_logits(model, layout, backend, recorded=recorded, compiles=False, scales=scales)
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_recorded_prompts_need_room_for_their_sequences_and_in_the_copy_for_their_context() -> None:
    layout = inspect_model(make_model("llama"), FP8)
    arena = DeviceArena(
        layout.cache_specs, num_blocks=9, block_size=4, dtype=FP8, device=torch.device("cpu")
    )
    backend = CpuFlashInfer(arena, layout.layers, records_prompts=True, widened_blocks=5)
    block_ids = torch.zeros(20, dtype=torch.int32)
    mixed = backend.record_mixed(
        max_num_seqs=3, max_num_tokens=8, block_ids=block_ids, scratch_block=8
    )
    assert mixed.holds(make_batch([(18, 2)], 0))  # 5 blocks
    assert not mixed.holds(make_batch([(19, 2)], 0))  # 6
    assert mixed.holds(make_batch([(31, 1), (10, 2)], 0))  # decodes attend to the cache
    assert not mixed.holds(make_batch([(11, 1), (10, 2), (2, 2), (0, 2)], 0))


class Recorded:
    """A model of one layer, which attends with queries, keys and values made of token ids."""

    def __init__(self, *, records_prompts: bool) -> None:
        model = make_model("llama")
        layout = inspect_model(model)
        self.layers = layout.layers[:1]
        self.spec = layout.cache_specs[:1]
        generator = torch.Generator().manual_seed(0)
        asked = self.layers[0]
        width = asked.cache.key_dim
        shapes = [asked.num_heads, asked.cache.num_kv_heads, asked.cache.num_kv_heads]
        self.tables = [torch.randn(64, n, width, generator=generator) for n in shapes]
        self.arena = self.make_arena()
        self.backend = CpuFlashInfer(
            self.arena,
            self.layers,
            records_prompts=records_prompts,
            most_recorded_seqs=MOST_RECORDED,
        )
        self.previous = torch.arange(10, 10 + MOST_SEQS)
        self.graphs = StepGraphs(
            self.forward,
            self.backend,
            self.previous,
            max_num_seqs=MOST_SEQS,
            max_num_tokens=MOST_TOKENS,
            max_context_blocks=MOST_BLOCKS,
            scratch_block=SCRATCH,
            before_cut=None,
            recorder=FakeRecorder(self.previous.device),  # type: ignore[arg-type]
        )
        while not self.graphs.is_complete:
            assert self.graphs.record_next()

    def make_arena(self) -> DeviceArena:
        return DeviceArena(
            self.spec,
            num_blocks=SCRATCH + 1,
            block_size=BLOCK,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Any, rows: Any
    ) -> torch.Tensor:
        query, key, value = (table[token_ids].transpose(0, 1) for table in self.tables)
        key = key * (1 + positions[None, :, None] / 8)
        logits = attention.attend(0, query, key, value).flatten(1)
        return logits if rows is None else logits[rows]


def make_batch(lengths: list[tuple[int, int]], seed: int) -> Batch:
    """A step of sequences of (context before, tokens of this step), each with own blocks."""
    random = np.random.default_rng(seed)
    lengths = sorted(lengths, key=lambda pair: pair[1] > 1)
    free = list(random.permutation(SCRATCH))
    columns, sequences, rows = [], [], []
    for past, count in lengths:
        context = past + count
        table = [int(free.pop()) for _ in range(-(-context // BLOCK))]
        start = len(columns)
        for position in range(past, context):
            source = int(random.integers(MOST_SEQS)) if random.random() < 0.2 else -1
            token = 0 if source >= 0 else int(random.integers(10))
            block, offset = table[position // BLOCK], position % BLOCK
            columns.append((token, position, block, offset, source, -1))
        sequences.append(SequenceSpan(start, count, context, table))
        rows.append(len(columns) - 1)
    inputs = np.array(columns, np.int64).T
    num_decodes = sum(count == 1 for _, count in lengths)
    sampled = random.permutation(np.array(rows, np.int64)) if num_decodes < len(rows) else rows
    none = np.empty(0, np.int64)
    return Batch(inputs, np.array(sampled), none, sequences, num_decodes, True)


@functools.cache
def recorded(records_prompts: bool) -> Recorded:
    return Recorded(records_prompts=records_prompts)


COUNTS = st.tuples(st.integers(0, 20), st.one_of(st.just(1), st.integers(1, 16)))


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.lists(COUNTS, min_size=1, max_size=MOST_SEQS), st.integers(0, 1000))
def test_a_step_of_any_size_is_computed_as_it_is_when_launched(
    records_prompts: bool, lengths: list[tuple[int, int]], seed: int
) -> None:
    made = recorded(records_prompts)
    batch = make_batch(lengths, seed)
    before = made.arena.storage.normal_(generator=torch.Generator().manual_seed(seed)).clone()
    called: list[str] = []
    logits = made.graphs.run(batch, lambda: called.append("ready"), is_decode=batch.is_decode)

    fits = batch.num_tokens <= MOST_TOKENS and (
        len(batch.sequences) <= MOST_RECORDED or not records_prompts
    )
    if logits is None:
        assert not fits and not called
        assert torch.equal(made.arena.storage, before)
        return
    assert fits and called == ["ready"]
    got, stored = logits.clone(), made.arena.storage.clone()
    made.arena.storage.copy_(before)
    inputs, rows = copy_batch(batch, torch.device("cpu"))
    attention = GatherBackend(made.arena, made.layers).begin_step(batch, inputs)
    expected = made.forward(inputs.resolve(made.previous), inputs.positions, attention, rows)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # What a recorded step writes beyond the tokens of the step goes to the scratch block.
    assert torch.equal(stored[:SCRATCH], made.arena.storage[:SCRATCH])


def test_a_step_in_parts_computes_each_of_its_rows_and_leaves_those_beyond_alone() -> None:
    made = Recorded(records_prompts=False)
    made.backend.value_scales[0] = 2.0  # what a row is multiplied by, in place
    batch = make_batch([(5, 1), (9, 1), (0, 7), (4, 2)], seed=0)
    [(_, output)] = made.graphs._buffers.values()
    output[batch.num_tokens :] = 3.0
    assert made.graphs.run(batch, lambda: None, is_decode=batch.is_decode) is not None
    got = output[: batch.num_tokens].flatten(1)

    inputs, _ = copy_batch(batch, torch.device("cpu"))
    attention = GatherBackend(made.arena, made.layers).begin_step(batch, inputs)
    expected = made.forward(inputs.resolve(made.previous), inputs.positions, attention, None)
    torch.testing.assert_close(got, 2 * expected, rtol=1e-4, atol=1e-4)
    assert output[batch.num_tokens :].eq(3.0).all()
