"""From the scheduler's choice to the message that an executor gets. Imports numpy, no torch."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from hotset.attention.batch import (
    BLOCK,
    NUM_INPUTS,
    OFFSET,
    POSITION,
    SOURCE,
    TOKEN,
    Batch,
    SequenceSpan,
)
from hotset.engine.step import Step, StepItem
from hotset.executor.step_input import SampleInput, ScoredTokens, SeenTokens, StepInput
from hotset.sequence import Kind, Request

Array = npt.NDArray[Any]


def make_step_input(step: Step, block_size: int) -> StepInput:
    """The arrays of a step, decodes first."""
    items = step.items
    columns: list[tuple[int, ...]] = []
    chunks: list[Array] = []
    sequences: list[SequenceSpan] = []
    ends: dict[int, int] = {}  # item -> the row after its last
    start = 0
    ordered = sorted(items, key=attrgetter("kind"))  # stable
    for item in ordered:
        request, num_tokens = item.request, item.num_tokens
        end = item.start + num_tokens
        table = request.kv.block_table[: -(-end // block_size)]
        if item.kind is Kind.DECODE:
            token_ids, source = request.token_ids, request.pending_row
            if source is None or end < len(token_ids):
                source = -1
            offset = item.start % block_size
            seat = -1 if request.kv.seat is None else request.kv.seat
            columns.append((token_ids[item.start], item.start, table[-1], offset, source, seat))
        else:
            chunks.append(_chunk(item, table, block_size))
        kv = request.kv
        cuts = [(cut.position - item.start, cut.slot) for cut in kv.cuts] if kv.cuts else ()
        sequences.append(
            SequenceSpan(
                start,
                num_tokens,
                end,
                table,
                kv.state_read,
                kv.state_write,
                cuts,
                request.sequence_id,
            )
        )
        start += num_tokens
        ends[id(item)] = start
    inputs = np.concatenate(
        [np.array(columns, np.int64).reshape(-1, NUM_INPUTS).T, *chunks], axis=1
    )
    is_unknown = inputs[SOURCE] >= 0
    # The placeholder of a token that is still being chosen is no index of an embedding.
    inputs[TOKEN, is_unknown] = 0
    sampling = [item for item in items if item.samples]
    scored_rows, scored = _scored(items, ends)
    batch = Batch(
        inputs,
        np.array([ends[id(item)] - 1 for item in sampling], np.int64),
        scored_rows,
        sequences,
        len(columns),
        bool(is_unknown.any()),
    )
    sample = make_sample_input([item.request for item in sampling])
    return StepInput(
        [item.kind for item in ordered], batch, sample, scored, step.copies, step.seats
    )


def make_sample_input(requests: Sequence[Request]) -> SampleInput:
    """How each of these chooses its next token."""
    return SampleInput(
        [request.sampling for request in requests],
        [len(request.token_ids) - request.prompt_len for request in requests],
        {
            request.sequence_id: SeenTokens(request.prompt_len, list(request.token_ids))
            for request in requests
            if request.sampling.counts_tokens
        },
    )


def _chunk(item: StepItem, table: Sequence[int], block_size: int) -> Array:
    """The rows of `Batch.inputs` for several tokens, `[6, num_tokens]`."""
    request, end = item.request, item.start + item.num_tokens
    chunk = np.full((NUM_INPUTS, item.num_tokens), -1, np.int64)
    chunk[TOKEN] = request.token_ids[item.start : end]
    chunk[POSITION] = positions = np.arange(item.start, end)
    first_block = item.start // block_size
    blocks = np.array(table[first_block:])
    chunk[BLOCK] = blocks[positions // block_size - first_block]
    chunk[OFFSET] = positions % block_size
    if end == request.num_tokens and request.pending_row is not None:
        chunk[SOURCE, -1] = request.pending_row
    return chunk


def _scored(items: Sequence[StepItem], ends: dict[int, int]) -> tuple[Array, list[ScoredTokens]]:
    """Rows whose logits tell log-probabilities of prompts, and of which tokens."""
    rows, scored = [np.empty(0, np.int64)], []
    for item in items:
        request = item.request
        if request.num_scored_tokens is None or not (positions := item.scored):
            continue
        rows.append(np.array(positions) - (item.start + item.num_tokens) + ends[id(item)])
        token_ids = request.token_ids[positions.start + 1 : positions.stop + 1]
        num_top = request.params.prompt_logprobs or 0
        scored.append(ScoredTokens(request.sequence_id, token_ids, num_top))
    return np.concatenate(rows), scored
