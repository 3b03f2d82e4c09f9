"""What requests have changed of the logits before a token is chosen from them."""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hotset.errors import RequestError
from hotset.executor.step_input import SampleInput, SeenTokens
from hotset.request import SamplingParams

Array = npt.NDArray[Any]


class LogitChanges:
    """Bias, penalties and `min_tokens`, in the order of transformers.

    Args:
        vocab_size: V, the width of the logits.
        device: where they are.
        eos_token_ids: what ends an output, beside a request's own `stop_token_ids`.
    """

    def __init__(self, vocab_size: int, device: torch.device, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._eos_token_ids = tuple(eos_token_ids)
        self._counts: dict[int, _TokenCounts] = {}  # by sequence id

    def validate(self, params: SamplingParams) -> None:
        """Check what needs the vocabulary to be checked. May be called from any thread.

        Raises:
            RequestError: `logit_bias` names a token that is not there.
        """
        most = self._vocab_size - 1
        for token_id in params.logit_bias:
            if not 0 <= token_id <= most:
                raise RequestError(
                    f"logit_bias has token id {token_id}; expected 0 to {most}", param="logit_bias"
                )

    def apply(self, logits: torch.Tensor, sample: SampleInput) -> None:
        """Change `logits`, `[N, V]` float32, in place; the host does not wait for the device."""
        self._bias(logits, sample)
        self._penalise(logits, sample)
        self._forbid_ends(logits, sample)

    def release(self, sequence_id: int) -> None:
        """Forget a sequence that has ended. Unknown ids are fine."""
        self._counts.pop(sequence_id, None)

    def _bias(self, logits: torch.Tensor, sample: SampleInput) -> None:
        rows, ids, values = [], [], []
        for row, sequence in enumerate(sample.sequences):
            if bias := sequence.params.logit_bias:
                rows.append(np.full(len(bias), row))
                ids.append(np.fromiter(bias.keys(), np.int64))
                values.append(np.fromiter(bias.values(), np.float32))
        if rows:
            index = (self._tensor(np.concatenate(rows)), self._tensor(np.concatenate(ids)))
            logits[index] += self._tensor(np.concatenate(values))

    def _forbid_ends(self, logits: torch.Tensor, sample: SampleInput) -> None:
        """Let no token end an output that has to go on."""
        places = [
            (row, token_id)
            for row, sequence in enumerate(sample.sequences)
            if sample.num_outputs[row] < sequence.params.min_tokens
            for token_id in self._ends(sequence.params)
        ]
        if places:
            rows, ids = self._tensor(np.array(places, np.int64)).unbind(1)
            logits[rows, ids] = -torch.inf

    def _ends(self, params: SamplingParams) -> set[int]:
        ends = {i for i in params.stop_token_ids if 0 <= i < self._vocab_size}
        return ends if params.ignore_eos else ends.union(self._eos_token_ids)

    def _penalise(self, logits: torch.Tensor, sample: SampleInput) -> None:
        """Apply the three penalties."""
        rows, ids, counts, factors = [], [], [], []
        for row, sequence in enumerate(sample.sequences):
            params = sequence.params
            if sequence.counts_tokens:
                seen = self._counts.setdefault(sequence.sequence_id, _TokenCounts())
                seen.update(sample.seen[sequence.sequence_id])
                rows.append(np.full(len(seen.ids), row))
                ids.append(np.array(seen.ids))
                counts.append(np.array(seen.counts))
                penalties = (
                    params.repetition_penalty,
                    params.presence_penalty,
                    params.frequency_penalty,
                )
                factors.append(np.broadcast_to(np.array(penalties, np.float32), (len(seen.ids), 3)))
        if not rows:
            return
        index = (self._tensor(np.concatenate(rows)), self._tensor(np.concatenate(ids)))
        count = self._tensor(np.concatenate(counts))
        repetition, presence, frequency = self._tensor(np.concatenate(factors)).unbind(1)
        values = logits[index]  # [M], M = distinct tokens, summed over the requests
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= presence * (count > 0) + frequency * count
        logits[index] = values

    def _tensor(self, values: Array) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


class _TokenCounts:
    """The distinct tokens of a request, and how often each is in its output."""

    def __init__(self) -> None:
        self.ids = array("q")
        self.counts = array("f")
        self._index: dict[int, int] = {}
        self._num_seen = 0

    def update(self, seen: SeenTokens) -> None:
        """Take in the tokens that are new since the last call."""
        for position in range(self._num_seen, len(seen.token_ids)):
            token_id = seen.token_ids[position]
            index = self._index.setdefault(token_id, len(self.ids))
            if index == len(self.ids):
                self.ids.append(token_id)
                self.counts.append(0.0)
            if position >= seen.prompt_len:
                self.counts[index] += 1.0
        self._num_seen = len(seen.token_ids)
