"""Structured output: which tokens may come next so that an output fits its JSON schema."""

import functools
import json
import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.hf
import torch

from hotset.errors import RequestError

# Between two JSON tokens: nothing, one space, or a line break with its indentation. Small models
# that may write any amount of whitespace often write nothing else until their budget is gone.
_COMPILE_OPTIONS = {"whitespace_pattern": r"(\n {0,16}| )?"}
_CACHED_SCHEMAS = 64


class JsonGrammars:
    """Compiles JSON schemas and computes token masks, with llguidance.

    The wrapped tokenizer is built on first use, as that can take seconds. `matcher` may be called
    from any thread.

    Args:
        tokenizer: a fast transformers tokenizer, or None (each schema is refused).
        vocab_size: V, the width of the logits; may be more than the tokenizer has.
        eos_token_ids: the tokens that are allowed once the JSON is complete.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._compile = functools.lru_cache(_CACHED_SCHEMAS)(self._compile_uncached)

    def matcher(self, schema: dict[str, Any]) -> llguidance.LLMatcher:
        """A fresh matcher for `schema`.

        Raises:
            RequestError: the schema is wrong, too complex or uses what is not supported.
        """
        # deep_copy of one object from two threads at once would raise.
        with self._lock:
            return self._compile(json.dumps(schema)).deep_copy()

    def mask(self, logits: torch.Tensor, matchers: dict[int, llguidance.LLMatcher]) -> None:
        """Set the logits of all tokens that may not come next to -inf, in place.

        Args:
            logits: `[R, V]`, any device. Mutated.
            matchers: row -> its matcher; other rows are left as they are.
        """
        num_words = (self._llguidance.vocab_size + 31) // 32
        bits = torch.zeros((len(matchers), num_words), dtype=torch.int32)
        self._executor.unsafe_compute_mask_ptr(
            [(matcher, i) for i, matcher in enumerate(matchers.values())],
            bits.data_ptr(),
            num_words * bits.itemsize,
            len(matchers),
        )
        bits = bits.to(logits.device)
        shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = (bits[:, :, None] >> shifts) & 1  # [G, V / 32, 32]
        forbidden = allowed.flatten(1)[:, : logits.shape[1]] == 0  # [G, V]
        rows = torch.tensor(list(matchers), device=logits.device)
        logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)

    @functools.cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor()

    @functools.cached_property
    def _llguidance(self) -> llguidance.LLTokenizer:
        if self._tokenizer is None:
            raise RequestError("json_schema needs a tokenizer, and this model has none")
        if not self._eos_token_ids:
            raise RequestError("json_schema needs an end-of-sequence token; this model has none")
        try:
            return llguidance.hf.from_tokenizer(
                self._tokenizer,
                n_vocab=max(self._vocab_size, len(self._tokenizer)),
                eos_token=self._eos_token_ids,
            )
        except ValueError as error:
            raise RequestError(
                f"json_schema cannot be used with this model's tokenizer: {_one_line(error)}"
            ) from error

    def _compile_uncached(self, schema: str) -> llguidance.LLMatcher:
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                schema, overrides=_COMPILE_OPTIONS
            )
        except ValueError as error:
            raise RequestError(f"json_schema cannot be used: {_one_line(error)}") from error
        matcher = llguidance.LLMatcher(self._llguidance, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"json_schema cannot be used: {_one_line(matcher.get_error())}")
        return matcher


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
