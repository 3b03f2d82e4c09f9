"""Whether indexers select what the model's own code does, found out on random tokens at load."""

from typing import Any

import torch
from transformers import PreTrainedModel

from hotset.attention.sparse.indexer import indexers
from hotset.attention.sparse.select import score_keys, select_positions
from hotset.errors import ModelError
from hotset.libraries import first_line

_NUM_TOKENS, _MOST_SELECTED = 64, 16
# Scores that differ by less than this share of the largest are alike but for rounding.
_ROUNDING = 1e-3


@torch.inference_mode()
def check_indexers(model: PreTrainedModel) -> None:
    """Run each indexer of a model on 64 random tokens, by its own code and by ours.

    Args:
        model: its indexers bound by `bind_indexers`, or without any; on its device.

    Raises:
        ModelError: they select other tokens.
    """
    for indexer in indexers(model):
        problem = _difference(model, indexer)
        if problem is not None:
            raise ModelError(
                f"{type(model).__name__} ({model.config.get_text_config().model_type}) "
                f"cannot run with sparse attention: the indexer of layer {indexer.layer_idx} "
                f"{problem}"
            )


def _difference(model: PreTrainedModel, indexer: Any) -> str | None:
    """What is wrong with our version of an indexer; None for nothing."""
    count = min(indexer.index_topk, _MOST_SELECTED)
    random = torch.Generator().manual_seed(indexer.layer_idx)
    hidden, residual = (
        torch.randn(1, _NUM_TOKENS, width, generator=random).to(model.device, model.dtype)
        for width in (indexer.hidden_size, indexer.q_lora_rank)
    )
    positions = torch.arange(_NUM_TOKENS, device=model.device)
    is_seen = positions <= positions[:, None]
    former = indexer.index_topk
    try:
        rotary = model.get_decoder().rotary_emb(hidden, position_ids=positions[None])
        indexer.index_topk = count
        theirs = (
            type(indexer)
            .forward(indexer, hidden, residual, rotary, is_seen[None], positions[None])[0]
            .long()
        )
        query, key, weights, _ = indexer(hidden, residual, rotary)
    except Exception as error:  # whatever code of another version makes of it
        return f"cannot be checked: {first_line(error)}"
    finally:
        indexer.index_topk = former
    scores = score_keys(query[0], weights[0], key[0]).masked_fill(~is_seen, -torch.inf)
    chosen = scores.gather(1, theirs)[count:]  # the first tokens select all they see
    ours = select_positions(scores, positions + 1, count)[count:]
    least = scores[count:].gather(1, ours.long()).amin(1, keepdim=True)
    tolerance = _ROUNDING * scores[is_seen].abs().amax()
    if bool((chosen < least - tolerance).any()):
        return "selects other tokens than the model's own code does"
    return None
