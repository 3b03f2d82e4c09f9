"""Which recorded step runs a step, and how that is padded, over many random steps."""

import random

import numpy as np
import pytest

from hotset.attention.batch import NUM_INPUTS
from hotset.executor.padding import packed, padding_column
from hotset.executor.recorded_sizes import RecordedStep, RecordedSteps

DECODE_SIZES, MIXED_SIZES = (1, 2, 4, 8, 16), (1, 16, 64, 256)


def never() -> bool:
    raise AssertionError("asked although no mixed step is recorded for it")


@pytest.mark.parametrize("seed", range(20))
def test_a_step_runs_in_one_that_is_recorded_and_holds_it_at_any_time(seed: int) -> None:
    rng = random.Random(seed)
    most_seqs, most_tokens = rng.randint(1, 40), rng.randint(1, 300)
    steps = RecordedSteps(DECODE_SIZES, MIXED_SIZES, most_seqs=most_seqs, most_tokens=most_tokens)
    recorded: list[RecordedStep] = []
    while True:
        for num_tokens in range(1, most_tokens + 1):
            for is_decode in (False, True):
                found = steps.find(num_tokens, is_decode=is_decode, is_held=lambda: True)
                if found is not None:
                    assert found in recorded and found.size >= num_tokens
                    assert is_decode or not found.is_decode
                    if found.is_decode:  # which needs no room among mixed steps
                        assert steps.find(num_tokens, is_decode=True, is_held=never) == found
                    else:
                        again = steps.find(num_tokens, is_decode=is_decode, is_held=lambda: False)
                        assert again is None
        missing = steps.next_missing
        if missing is None:
            break
        assert missing not in recorded
        recorded.append(missing)
        steps.add(missing, rng.random())

    first_mixed = [step.is_decode for step in recorded].index(False)
    assert not any(step.is_decode for step in recorded[first_mixed:])  # decodes come first
    for num_tokens in range(1, most_tokens + 1):
        found = steps.find(num_tokens, is_decode=False, is_held=lambda: True)
        assert (found is not None) == (num_tokens <= steps.largest_mixed)
    assert steps.largest_mixed == min(most_tokens, MIXED_SIZES[-1])
    assert max(s.size for s in recorded if s.is_decode) == min(most_seqs, most_tokens, 16)


def test_before_anything_is_recorded_a_step_is_launched() -> None:
    steps = RecordedSteps(DECODE_SIZES, MIXED_SIZES, most_seqs=8, most_tokens=64)
    assert steps.next_missing == RecordedStep(True, 8)
    assert steps.find(1, is_decode=True, is_held=never) is None
    assert steps.find(9, is_decode=False, is_held=never) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_padded_step_has_its_tokens_and_rows_first_and_writes_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_tokens, num_rows = int(rng.integers(1, 20)), int(rng.integers(0, 9))
    held, held_rows = int(rng.integers(0, num_tokens + 1)), int(rng.integers(0, num_rows + 1))
    inputs = rng.integers(1, 500, (NUM_INPUTS, held))
    rows = rng.integers(0, num_tokens, held_rows)
    values = packed(inputs, rows, padding_column(999), num_tokens=num_tokens, num_rows=num_rows)
    assert values.dtype == np.int64 and values.shape == (NUM_INPUTS * num_tokens + num_rows,)
    tokens = values[: NUM_INPUTS * num_tokens].reshape(NUM_INPUTS, num_tokens)
    assert np.array_equal(tokens[:, :held], inputs)
    beyond = tokens[:, held:].T.tolist()
    assert beyond == [[0, 0, 999, 0, -1, -1]] * (num_tokens - held)  # KV where it is never read
    assert values[NUM_INPUTS * num_tokens :].tolist() == [
        *rows.tolist(),
        *[0] * (num_rows - held_rows),
    ]
