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
        has_ranks: whether the rank of each token is wanted, too.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        num_top: Sequence[int],
        *,
        has_ranks: bool,
    ) -> None:
        self._num_top, self._num_ranks = num_top, int(has_ranks)
        most = min(max(num_top), logits.shape[1])
        size = max(1, _GROUP_LOGITS // logits.shape[1])
        pieces = zip(logits.split(size), token_ids.split(size), strict=True)
        scored = [_score(rows, targets, most, has_ranks) for rows, targets in pieces]
        values, ids = zip(*scored, strict=True)
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
        first = self._num_ranks
        return [
            TokenLogprob(
                token_id,
                logprob,
                tuple(zip(ids[first : first + n], others[:n], strict=True)),
                rank=ids[0] if first else None,
            )
            for token_id, n, ids, (logprob, *others) in rows
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
        self._scored = PendingLogprobs(logits, targets, num_top, has_ranks=True)

    def wait(self) -> list[list[TokenLogprob]]:
        """Block until they are there; those of each span, in the order of its tokens."""
        rows = iter(self._scored.wait(self._token_ids))
        return [list(itertools.islice(rows, len(span.token_ids))) for span in self._spans]


def _score(
    logits: torch.Tensor, targets: torch.Tensor, num_top: int, has_ranks: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the targets and of the likeliest tokens.

    Args:
        logits: `[N, V]`, any float dtype.
        targets: `[N]` int64.
        num_top: K.
        has_ranks: whether ranks of the targets are wanted.

    Returns:
        `[N, 1 + K]` float32, the target's first; and the ids of the likeliest, `[N, K]` int64, or
        `[N, 1 + K]` behind the target's rank, 1 being the likeliest.
    """
    logits = logits.float()
    log_total = logits.logsumexp(-1, keepdim=True)  # [N, 1]
    chosen = logits.gather(1, targets[:, None])  # [N, 1]
    values, ids = chosen, targets[:, None][:, :0]
    if num_top:
        top = logits.topk(num_top)
        values, ids = torch.cat([chosen, top.values], dim=1), top.indices
    if has_ranks:
        rank = (logits > chosen).sum(-1, keepdim=True) + 1
        ids = torch.cat([rank, ids], dim=1)
    return values - log_total, ids
