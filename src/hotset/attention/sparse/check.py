"""Whether indexers select what the model's own code does, found out on random tokens at load."""

from typing import Any

import torch
from transformers import PreTrainedModel

from hotset.attention.sparse.indexer import indexers
from hotset.attention.sparse.rounded import round_keys, turn, turned_query
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


@torch.inference_mode()
def share_kept(model: PreTrainedModel) -> float:
    """Of what indexers select among 64 random tokens, the share that 8-bit keys select as well.

    Args:
        model: it has indexers, bound by `bind_indexers`; on its device.
    """
    shares = []
    for indexer in indexers(model):
        count = min(indexer.index_topk, _MOST_SELECTED)
        given, positions = _random_tokens(model, indexer)
        query, key, weights, *_ = indexer(*given)
        keys, scales = round_keys(turn(key[0]))
        rounded = keys.float() * scales.unsqueeze(-1)
        plain, other = (
            select_positions(score_keys(q, weights[0], k), positions + 1, count)[count:]
            for q, k in ((query[0], key[0]), (turned_query(query[0]), rounded))
        )
        shares.append((plain.unsqueeze(2) == other.unsqueeze(1)).any(2).float().mean().item())
    return sum(shares) / len(shares)


def _random_tokens(
    model: PreTrainedModel, indexer: Any
) -> tuple[tuple[torch.Tensor, torch.Tensor, Any], torch.Tensor]:
    """What an indexer is given of 64 tokens, the same each time, and their positions."""
    random = torch.Generator().manual_seed(indexer.layer_idx)
    hidden, residual = (
        torch.randn(1, _NUM_TOKENS, width, generator=random).to(model.device, model.dtype)
        for width in (indexer.hidden_size, indexer.q_lora_rank)
    )
    positions = torch.arange(_NUM_TOKENS, device=model.device)
    rotary = model.get_decoder().rotary_emb(hidden, position_ids=positions[None])
    return (hidden, residual, rotary), positions


def _difference(model: PreTrainedModel, indexer: Any) -> str | None:
    """What is wrong with our version of an indexer; None for nothing."""
    count = min(indexer.index_topk, _MOST_SELECTED)
    former = indexer.index_topk
    try:
        given, positions = _random_tokens(model, indexer)
        is_seen = positions <= positions[:, None]
        indexer.index_topk = count
        theirs = type(indexer).forward(indexer, *given, is_seen[None], positions[None])[0].long()
        query, key, weights, *_ = indexer(*given)
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
