"""Steps of lanes that run at the same time, made alike. Imports numpy, no torch.

Ranks compute the experts of all tokens together. What changes the sizes of their collectives, or
which of them run, is decided here, of all lanes at once: no rank decides it by its own lane.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hotset.attention.batch import Batch
from hotset.executor.padding import Array, padding_column
from hotset.executor.step_input import SampleInput, ScoredTokens, StepInput, Together


def align(
    steps: Sequence[StepInput], *, scratch_block: int, holds: Callable[[Batch], bool]
) -> list[StepInput]:
    """The same steps, of as many tokens each: padded, and all replayed in one size or launched.

    Args:
        steps: by lane; one of them or more has tokens.
        scratch_block: a block of each lane that no request gets, for the tokens of padding.
        holds: whether a recorded step has room for the sequences of a batch.
    """
    batches = [step.batch for step in steps]
    num_tokens = max(batch.num_tokens for batch in batches)
    has_scored = any(len(batch.scored_rows) for batch in batches)
    together = Together(
        num_rows=max(len(batch.sampled_rows) + len(batch.scored_rows) for batch in batches),
        num_chosen=sum(len(batch.sampled_rows) for batch in batches),
        is_decode=all(batch.is_decode for batch in batches),
        is_launched=has_scored or not all(map(holds, batches)),
    )
    padding = padding_column(scratch_block)[:, None]
    return [
        replace(step, batch=_padded(step.batch, num_tokens, padding), together=together)
        for step in steps
    ]


def _padded(batch: Batch, num_tokens: int, padding: Array) -> Batch:
    num_padding = num_tokens - batch.num_tokens
    if not num_padding:
        return batch
    inputs = np.concatenate([batch.inputs, padding.repeat(num_padding, axis=1)], axis=1)
    return replace(batch, inputs=inputs, num_padding=num_padding)


def rows_of_all(steps: Sequence[StepInput]) -> Array:
    """Where the logits of all lanes are, if each has `num_rows` rows: those that choose, first."""
    sampled, scored = [], []
    for number, step in enumerate(steps):
        assert step.together is not None
        first = number * step.together.num_rows
        middle = first + len(step.batch.sampled_rows)
        sampled.append(np.arange(first, middle))
        scored.append(np.arange(middle, middle + len(step.batch.scored_rows)))
    return np.concatenate([*sampled, *scored])


def sample_all(steps: Sequence[StepInput]) -> tuple[SampleInput, list[ScoredTokens]]:
    """How the tokens of all lanes are chosen, and which of prompts are scored."""
    samples = [step.sample for step in steps]
    sample = SampleInput(
        [one for each in samples for one in each.sequences],
        [num for each in samples for num in each.num_outputs],
        {key: seen for each in samples for key, seen in each.seen.items()},
    )
    return sample, [one for step in steps for one in step.scored]
