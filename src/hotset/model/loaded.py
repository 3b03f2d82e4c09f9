"""A model that was loaded, as other processes know it too. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from hotset.errors import ModelError


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, and what the rest of the engine must know of it.

    Attributes:
        model: the transformers model: in eval mode, no gradients, on its device.
        tokenizer: None where the checkpoint brings none; see `require_tokenizer`.
        name: short, for the API.
        fingerprint: 32 hex digits that change when the config or the weights do; see `fingerprint`.
        eos_token_ids: ids that end an answer, in no particular order.
        max_model_len: the longest context the model was made for, in tokens.
        kv_scales: for each layer, what keys and values divided by fit 8-bit floats best; None where
            the checkpoint does not say.
        notes: lines for the user: the parts of the checkpoint that are not loaded or served.
        ranks: the other processes that have parts of the model, see `ranks.driver.Ranks`; None
            where this one has all of it.
    """

    model: Any
    tokenizer: Any | None
    name: str
    fingerprint: str
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    kv_scales: tuple[tuple[float, float], ...] | None = None
    notes: tuple[str, ...] = ()
    ranks: Any = None

    def require_tokenizer(self) -> Any:
        """Return the tokenizer, or raise ModelError where there is none."""
        if self.tokenizer is None:
            raise no_tokenizer(self.name)
        return self.tokenizer


def no_tokenizer(name: str) -> ModelError:
    """What to raise where a model has to have a tokenizer and has none."""
    return ModelError(
        f"model {name!r} has no tokenizer files, so it takes token ids only; "
        "put the tokenizer's files (tokenizer.json, ...) into its folder"
    )
