"""Making a model's program for rows, and comparing it with the model before it is used."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from hotset.attention.backend import StepAttention
from hotset.attention.batch import NUM_INPUTS, Batch, SequenceSpan
from hotset.attention.gather import GatherBackend
from hotset.attention.inputs import copy_batch
from hotset.attention.spec import LayerAttention
from hotset.executor.rows.program import RowProgram
from hotset.executor.rows.trace import NotTraceable, trace
from hotset.linear import native
from hotset.linear.narrow import narrow_tiles
from hotset.memory.arena import DeviceArena

# Of the largest logit. Sums in other orders differ by 1e-6 after 30 layers.
_BOUND = 1e-4
_POSITION = 3  # of the last token of a trial

# Token ids, positions, attention and rows -> logits of the rows.
Logits = Callable[[torch.Tensor, torch.Tensor, StepAttention, torch.Tensor], torch.Tensor]

_log = logging.getLogger(__name__)


def make_program(
    model: PreTrainedModel,
    arena: DeviceArena,
    layers: Sequence[LayerAttention],
    backend: GatherBackend,
    logits: Logits,
    scratch_block: int,
) -> RowProgram | None:
    """Code for the steps of a model with narrow weights on a CPU; None where there is none.

    Args:
        model: switched to paged attention.
        arena: has the KV.
        layers: what each of the model's layers asks for.
        backend: attends over `arena`.
        logits: runs the model.
        scratch_block: a block that no request gets; written.
    """
    is_float = model.device.type == "cpu" and model.dtype == torch.float32
    has_room = arena.block_size > _POSITION
    if not (is_float and has_room and narrow_tiles(model) and native.can_compile()):
        return None
    try:
        program = RowProgram(trace(model), arena, layers)
        trials = _trials(model.config.get_text_config().vocab_size, scratch_block)
        found = [_difference(program, backend, logits, batch) for batch in trials]
    except NotTraceable as why:
        _log.info("steps run operation by operation: %s", why)
        return None
    except Exception as error:
        _log.warning("steps run operation by operation: %s", str(error).splitlines()[:1])
        return None
    if all(difference < _BOUND for difference in found):
        return program
    _log.warning("steps run operation by operation, as compiled ones are wrong by %s", found)
    return None


def _difference(program: RowProgram, backend: GatherBackend, logits: Logits, batch: Batch) -> float:
    """Of the program's logits from the model's, in parts of the largest; NaN where one is NaN."""
    inputs, rows = copy_batch(batch, torch.device("cpu"))
    attention = backend.begin_step(batch, inputs)
    expected = logits(inputs.token_ids, inputs.positions, attention, rows).clone()
    found = program.logits(batch, inputs, inputs.token_ids, attention, rows)
    return float((found - expected).abs().max() / expected.abs().max())


def _trials(vocab_size: int, block: int) -> list[Batch]:
    """A prompt, all of whose rows are wanted but one, and a decode behind it."""
    prompt = SequenceSpan(0, _POSITION, _POSITION, [block])
    decode = SequenceSpan(0, 1, _POSITION + 1, [block])
    tokens = np.arange(_POSITION + 1) * (vocab_size // 5) + 1
    return [
        _batch(prompt, tokens[:-1], 0, [0, 2], block),
        _batch(decode, tokens[-1:], 3, [0], block),
    ]


def _batch(
    sequence: SequenceSpan, tokens: np.ndarray, first: int, rows: list[int], block: int
) -> Batch:
    positions = np.arange(first, first + len(tokens))
    inputs = np.full((NUM_INPUTS, len(tokens)), -1, np.int64)
    inputs[:4] = tokens, positions, np.full(len(tokens), block), positions
    is_decode = len(tokens) == 1
    wanted = np.array(rows, np.int64)
    return Batch(inputs, wanted, wanted[:0], [sequence], int(is_decode), has_unknown=False)
