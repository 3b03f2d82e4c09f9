"""Log-probabilities of the tokens of prompts."""

from collections.abc import Sequence

import numpy as np
import torch

from hotset.attention.inputs import HostCopy, to_device
from hotset.executor.step_input import ScoredTokens
from hotset.request import TokenLogprob

# Rows are worked on in float32 in groups of at most this many logits.
_GROUP_LOGITS = 2**23


class PendingPromptLogprobs:
    """Log-probabilities of prompt tokens, being computed on the device.

    P = tokens, V = vocabulary, K = the likeliest tokens that are wanted at most.

    Args:
        spans: tokens of each prompt.
        logits: `[P, V]`, any float dtype, a row for each of those tokens, which tells of it. Not
            changed, and not read once this returns, but for what the device has queued.
    """

    def __init__(self, spans: Sequence[ScoredTokens], logits: torch.Tensor) -> None:
        self._spans = spans
        num_top = min(max(span.num_top for span in spans), logits.shape[1])
        token_ids = [token_id for span in spans for token_id in span.token_ids]
        targets = to_device(np.array(token_ids, np.int64), logits.device)
        group = max(1, _GROUP_LOGITS // logits.shape[1])
        parts = [
            _score(logits[start : start + group], targets[start : start + group], num_top)
            for start in range(0, len(logits), group)
        ]
        self._values = HostCopy(torch.cat([values for values, _ in parts]))  # [P, 1 + K]
        self._ids = HostCopy(torch.cat([ids for _, ids in parts]))  # [P, 1 + K]

    def wait(self) -> list[list[TokenLogprob]]:
        """Block until they are there; those of each span, in the order of its tokens."""
        values: list[list[float]] = self._values.wait().tolist()
        ids: list[list[int]] = self._ids.wait().tolist()
        rows = iter(zip(ids, values, strict=True))
        found = []
        for span in self._spans:
            n, entries = span.num_top, []
            for token_id in span.token_ids:
                (rank, *likeliest), (logprob, *others) = next(rows)
                top = tuple(zip(likeliest[:n], others[:n], strict=True))
                entries.append(TokenLogprob(token_id, logprob, top, rank=rank))
            found.append(entries)
        return found


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
