"""Sizes as configs of transformers name them."""

from typing import Any

# What configs call the number of experts of a layer.
EXPERT_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts")
_CONTEXT_LENGTH_NAMES = ("max_position_embeddings", "max_sequence_length", "seq_length")


def largest(config: Any, name: str) -> int:
    """A size: its value, the largest of a list of layers' values, 0 if there is none."""
    value = getattr(config, name, None)
    values = value if isinstance(value, list | tuple) else [value]
    return max((number for number in values if isinstance(number, int)), default=0)


def num_experts(config: Any) -> int:
    """Experts of a layer; 0 of a dense model."""
    return max(largest(config, name) for name in EXPERT_COUNT_NAMES)


def context_length(config: Any) -> int | None:
    """The longest context in tokens that a model was made for; None where its config is silent.

    With `longrope` it is the context of the short factors: a longer sequence would change the keys
    of all sequences in its step, and its own keys of earlier steps.
    """
    for name in _CONTEXT_LENGTH_NAMES:
        if (length := largest(config, name)) > 0:
            return min([length, *_unscaled_lengths(config)])
    return None


def _unscaled_lengths(config: Any) -> list[int]:
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    kinds = [part for part in parameters.values() if isinstance(part, dict)] or [parameters]
    name = "original_max_position_embeddings"
    lengths = [
        kind.get(name, getattr(config, name, None))
        for kind in kinds
        if kind.get("rope_type", kind.get("type")) == "longrope"
    ]
    return [length for length in lengths if isinstance(length, int)]
