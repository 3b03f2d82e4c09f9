"""The last steps of loading, and where a model's context ends."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from hotset.cost.config_sizes import context_length, largest
from hotset.errors import ModelError
from hotset.executor.probe import inspect_model
from hotset.experts.disk import ExpertSink
from hotset.experts.weights import experts_layers
from hotset.linear.fp8_linear import quantize_linears
from hotset.model.architecture import Architecture

_log = logging.getLogger(__name__)


def finish(model: Any, dtype: str, architecture: Architecture) -> tuple[str, ...]:
    """Make a model ready for inference, in place: its 8-bit weights, eval mode, no gradients.

    Returns lines for the user: what of the checkpoint is not served.
    """
    _round(model, dtype, architecture)
    model.eval().requires_grad_(False)
    return (*architecture.notes, *_context_notes(model))


def _round(model: Any, dtype: str, architecture: Architecture) -> None:
    """Round the weights of linear layers, where `dtype` asks for it and they are not yet."""
    if dtype != "fp8":
        return
    architecture.mark_read_layers(model)
    if not architecture.is_inspected:
        inspect_model(model)  # marks them too
    quantize_linears(model)
    if experts_layers(model):
        _log.warning("with dtype fp8 the weights of experts stay in bfloat16")
    if model.device.type == "cpu":
        _log.warning("dtype fp8 is for GPUs: the CPU computes it much more slowly than bfloat16")


@contextlib.contextmanager
def closing_on_error(experts: ExpertSink | None) -> Iterator[None]:
    """Close `experts` if loading fails."""
    try:
        yield
    except BaseException:
        if experts is not None:
            experts.close()
        raise


def _context_notes(model: Any) -> tuple[str, ...]:
    """A line where the context ends before the config says."""
    config = model.config.get_text_config()
    served, named = context_length(config), largest(config, "max_position_embeddings")
    if served is None or served >= named:
        return ()
    return (
        f"context: {served:,} of {named:,} tokens, as the rotary embeddings (longrope) of longer "
        "texts would change those of all that share a step",
    )


def max_model_len(model: Any, tokenizer: Any | None, name: str) -> int:
    """The longest context the model was made for; ModelError where nothing names it."""
    if (named := context_length(model.config.get_text_config())) is not None:
        return named
    length = getattr(tokenizer, "model_max_length", None)
    if isinstance(length, int) and length < 2**31:  # transformers writes 1e30 for "none"
        return length
    raise ModelError(
        f"the config of {name} names no context length; add max_position_embeddings to it"
    )
