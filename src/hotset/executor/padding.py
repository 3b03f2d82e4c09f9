"""A step's inputs as a recorded step of a larger size reads them. Imports numpy, no torch."""

import numpy as np
import numpy.typing as npt

from hotset.attention.batch import NUM_INPUTS

Array = npt.NDArray[np.int64]


def padding_column(scratch_block: int) -> Array:
    """`[6]`, a token of padding: id 0 at position 0, known, its KV where it is never read."""
    return np.array([0, 0, scratch_block, 0, -1, -1], np.int64)


def packed(inputs: Array, rows: Array, padding: Array, *, num_tokens: int, num_rows: int) -> Array:
    """A step in one array, `[6 * num_tokens + num_rows]` int64.

    Args:
        inputs: `[6, T]`, T at most `num_tokens`; see `Batch.inputs`. `padding` is beyond.
        rows: `[R]`, R at most `num_rows`, whose logits are wanted; row 0 is beyond.
        padding: see `padding_column`.
        num_tokens: of the recorded step.
        num_rows: of the recorded step.
    """
    end = NUM_INPUTS * num_tokens
    values = np.zeros(end + num_rows, np.int64)
    tokens = values[:end].reshape(NUM_INPUTS, num_tokens)
    tokens[:, : inputs.shape[1]] = inputs
    tokens[:, inputs.shape[1] :] = padding[:, None]
    values[end : end + len(rows)] = rows
    return values
