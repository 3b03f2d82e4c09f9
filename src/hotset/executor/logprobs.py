"""Log-probabilities of tokens: of those that are chosen, and of those of prompts."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from hotset.attention.inputs import HostCopy, to_device
from hotset.executor.step_input import ScoredTokens
from hotset.request import TokenLogprob

# Rows are worked on in float32 in groups of at most this many logits.
_GROUP_LOGITS = 2**23


class PendingLogprobs:
    """Log-probabilities of some tokens, being computed on the device.

    N = tokens, V = vocabulary, K = the likeliest tokens that are wanted at most.

    Args:
        logits: `[N, V]`, any float dtype, a row for each token, which tells of it. Not changed, and
            not read once this returns, but for what the device has queued.
        token_ids: `[N]` int64, on the device.
        num_top: how many of the likeliest tokens are wanted beside each.
    """

    def __init__(
        self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int]
    ) -> None:
        self._num_top = num_top
        most = min(max(num_top), logits.shape[1])
        size = max(1, _GROUP_LOGITS // logits.shape[1])
        pieces = zip(logits.split(size), token_ids.split(size), strict=True)
        values, ids = zip(*(_score(rows, targets, most) for rows, targets in pieces), strict=True)
        self._values, self._ids = HostCopy(torch.cat(values)), HostCopy(torch.cat(ids))

    def wait(self, token_ids: Sequence[int]) -> list[TokenLogprob]:
        """Block until they are there; the ids are those of the device."""
        rows = zip(
            token_ids,
            self._num_top,
            self._ids.wait().tolist(),
            self._values.wait().tolist(),
            strict=True,
        )
        return [
            TokenLogprob(token_id, logprob, tuple(zip(top[:n], others[:n], strict=True)), rank=rank)
            for token_id, n, (rank, *top), (logprob, *others) in rows
        ]


class PendingPromptLogprobs:
    """Log-probabilities of the tokens of some prompts, being computed on the device.

    Args:
        spans: tokens of each prompt.
        logits: of all of them, as for `PendingLogprobs`.
    """

    def __init__(self, spans: Sequence[ScoredTokens], logits: torch.Tensor) -> None:
        self._spans = spans
        self._token_ids = [token_id for span in spans for token_id in span.token_ids]
        num_top = [span.num_top for span in spans for _ in span.token_ids]
        targets = to_device(np.array(self._token_ids, np.int64), logits.device)
        self._scored = PendingLogprobs(logits, targets, num_top)

    def wait(self) -> list[list[TokenLogprob]]:
        """Block until they are there; those of each span, in the order of its tokens."""
        rows = iter(self._scored.wait(self._token_ids))
        return [list(itertools.islice(rows, len(span.token_ids))) for span in self._spans]


def _score(
    logits: torch.Tensor, targets: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the targets and of the likeliest tokens.

    Args:
        logits: `[N, V]`, any float dtype.
        targets: `[N]` int64.
        num_top: K.

    Returns:
        `[N, 1 + K]` float32, the target's first; and `[N, 1 + K]` int64: the target's rank, 1 being
        the likeliest, and the ids of the likeliest.
    """
    logits = logits.float()
    log_total = logits.logsumexp(-1, keepdim=True)  # [N, 1]
    chosen = logits.gather(1, targets[:, None])  # [N, 1]
    rank = (logits > chosen).sum(-1, keepdim=True) + 1
    if num_top == 0:
        return chosen - log_total, rank
    top = logits.topk(num_top)
    values = torch.cat([chosen, top.values], dim=1) - log_total
    return values, torch.cat([rank, top.indices], dim=1)
