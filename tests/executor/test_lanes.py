"""Steps of lanes are made alike by what all of them have, and their logits are found again."""

import numpy as np
import pytest

from hotset.attention.batch import BLOCK, NUM_INPUTS, OFFSET, SOURCE, Batch, SequenceSpan
from hotset.executor.lanes import align, rows_of_all, sample_all
from hotset.executor.recorded_sizes import RecordedStep, RecordedSteps
from hotset.executor.step_input import SampleInput, ScoredTokens, StepInput, Together
from hotset.request import SamplingParams
from hotset.sequence import Kind, Sampling

SCRATCH = 77


def make_step(
    *counts: int, samples: bool = True, num_scored: int = 0, first_id: int = 0
) -> StepInput:
    """A step of a sequence for each of `counts` tokens, decodes first."""
    spans, start = [], 0
    for number, count in enumerate(counts):
        spans.append(SequenceSpan(start, count, count + 5, [1, 2], sequence_id=first_id + number))
        start += count
    inputs = np.arange(NUM_INPUTS * start).reshape(NUM_INPUTS, start)
    ends = np.array([span.start + span.num_tokens - 1 for span in spans], np.int64)
    kinds = [Kind.DECODE if count == 1 else Kind.PROMPT for count in counts]
    rows = ends if samples else ends[:0]
    scored = np.arange(num_scored)
    batch = Batch(inputs, rows, scored, spans, counts.count(1), False)
    of_prompts = [ScoredTokens(first_id, [5] * num_scored, 1)] if num_scored else []
    params = [Sampling(first_id + i, 0, SamplingParams()) for i in range(len(rows))]
    return StepInput(kinds, batch, SampleInput(params, [7] * len(params)), of_prompts)


def aligned(*steps: StepInput, holds: bool = True) -> list[StepInput]:
    return align(steps, scratch_block=SCRATCH, holds=lambda batch: holds)


def test_all_lanes_have_the_tokens_of_the_fullest_one() -> None:
    steps = aligned(make_step(1, 1), make_step(1, 4), make_step())
    assert [step.num_tokens for step in steps] == [5, 5, 5]
    assert [step.batch.num_padding for step in steps] == [3, 0, 5]
    assert [step.batch.num_attending for step in steps] == [2, 5, 0]
    padding = steps[2].batch.inputs
    assert set(padding[BLOCK]) == {SCRATCH} and set(padding[OFFSET]) == {0}
    assert set(padding[SOURCE]) == {-1}
    assert np.array_equal(steps[0].batch.inputs[:, :2], make_step(1, 1).batch.inputs)
    assert [len(step.batch.sequences) for step in steps] == [2, 2, 0]


def test_what_they_have_in_common_is_of_all() -> None:
    decodes, idle = make_step(1, 1, 1), make_step()
    assert aligned(decodes, idle)[1].together == Together(3, 3, True, False)
    # One prompt has all lanes run as it does.
    assert aligned(decodes, make_step(6))[0].together == Together(3, 4, False, False)
    assert aligned(decodes, make_step(6, samples=False))[0].together == Together(3, 3, False, False)
    # And so has one that no recorded step has room for, or whose prompt is scored.
    assert aligned(decodes, idle, holds=False)[0].together == Together(3, 3, True, True)
    assert aligned(decodes, make_step(6, num_scored=4))[1].together == Together(5, 4, False, True)


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 9), (30,), ()])
def test_each_rank_finds_the_same_recorded_size(counts: tuple[int, ...]) -> None:
    """By its own step alone, whatever the other lanes have."""
    recorded = RecordedSteps((1, 2, 4, 8), (16, 32), most_seqs=8, most_tokens=32)
    while (missing := recorded.next_missing) is not None:
        recorded.add(missing, float(missing.size))
    found: list[RecordedStep | None] = []
    for step in aligned(make_step(*counts), make_step(1, 1), make_step(1)):
        assert step.together is not None
        found.append(
            recorded.find(step.num_tokens, is_decode=step.together.is_decode, is_held=lambda: True)
        )
    assert found == found[:1] * 3 and found[0] is not None


def test_logits_of_all_lanes_are_found_where_each_rank_puts_them() -> None:
    steps = aligned(
        make_step(1, 1),
        make_step(6, num_scored=3, first_id=10),
        make_step(),
        make_step(1, first_id=20),
    )
    # [lane, row] of 4 rows each: 2 that choose; 1 that chooses and 3 scored; none; 1 that chooses.
    assert rows_of_all(steps).tolist() == [0, 1, 4, 12, 5, 6, 7]
    sample, scored = sample_all(steps)
    assert [one.sequence_id for one in sample.sequences] == [0, 1, 10, 20]
    assert list(sample.num_outputs) == [7] * 4
    assert [one.sequence_id for one in scored] == [10]
