"""Requests as they arrive: their tokens checked, and made into sequences. Imports no torch."""

import math
from collections.abc import Sequence

from hotset.engine.messages import Submit
from hotset.errors import RequestError
from hotset.request import Resumed, SamplingParams
from hotset.sequence import Request


def check_tokens(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    resumed: Sequence[Resumed],
    *,
    vocab_size: int,
    max_model_len: int,
) -> None:
    """Check numbers and lengths. Raises RequestError: it can never be served."""
    if not prompt_ids:
        raise RequestError("the prompt is empty; expected at least one token", param="prompt")
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        raise RequestError(f"a prompt token id is not in [0, {vocab_size})", param="prompt")
    if len(prompt_ids) >= max_model_len:
        raise RequestError(
            f"the prompt has {len(prompt_ids)} tokens; the longest context is {max_model_len} with "
            "at least one left to generate",
            param="prompt",
            code="context_length_exceeded",
        )
    indices = [one.index for one in resumed]
    if not set(indices) <= set(range(params.n)) or len(set(indices)) < len(indices):
        raise RequestError(
            f"outputs {indices} are to go on; expected each of 0 to {params.n - 1} once at most",
            param="resumed",
        )
    for one in resumed:
        _check_answer(len(prompt_ids), params, one, vocab_size, max_model_len)


def _check_answer(
    prompt_len: int, params: SamplingParams, one: Resumed, vocab_size: int, max_model_len: int
) -> None:
    token_ids, what = one.token_ids, f"output {one.index}"
    if not token_ids:
        return
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise RequestError(f"a token id of {what} is not in [0, {vocab_size})", param="resumed")
    if params.max_tokens is not None and len(token_ids) >= params.max_tokens:
        raise RequestError(
            f"{what} cannot go on from its {len(token_ids)} tokens: max_tokens is "
            f"{params.max_tokens}",
            param="resumed",
        )
    if prompt_len + len(token_ids) >= max_model_len:
        raise RequestError(
            f"{what} cannot go on from its {len(token_ids)} tokens: with {prompt_len} of the "
            f"prompt it is as long as the longest context, which is {max_model_len}",
            param="resumed",
            code="context_length_exceeded",
        )


def make_requests(submit: Submit, *, max_model_len: int, arrival_s: float) -> list[list[Request]]:
    """The sequences of a request, in groups: those of one share the blocks of their prompt.

    An output that is resumed is a request that was preempted, by an engine that is gone: it has
    its tokens, none of them computed here, and goes before all that have not begun.
    """
    params, prompt_len = submit.params, len(submit.token_ids)
    max_total = max_model_len
    if params.max_tokens is not None:
        # Where none is wanted, one is chosen nevertheless, as part of the prompt's last step.
        max_total = min(max_total, prompt_len + max(1, params.max_tokens))
    new = [Resumed(index) for index in range(params.n)]
    groups: list[list[Request]] = []
    fresh: list[Request] = []
    for one in submit.resumed or new:
        request = Request(
            request_id=submit.request_id,
            prompt_len=prompt_len,
            token_ids=[*submit.token_ids, *one.token_ids],
            params=params,
            max_total_tokens=max_total,
            index=one.index,
            salt=submit.salt,
            priority=submit.priority,
            tenant=submit.tenant,
            arrival_s=-math.inf if one.token_ids else arrival_s,
            snapshot_at=submit.snapshot_at,
        )
        if one.token_ids:
            request.kv.high_water_tokens = request.num_tokens - 1
            request.queue.num_preemptions = 1
            groups.append([request])
        else:
            # What it finds of its prompt was counted where the request came first.
            request.kv.num_sibling_tokens = prompt_len if submit.resumed else 0
            fresh.append(request)
    if fresh and not groups and params.prompt_logprobs is not None:
        fresh[0].num_scored_tokens = 0  # they came before any token of an output
    return [*groups, fresh] if fresh else groups
