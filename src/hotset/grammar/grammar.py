"""Structured output: which tokens may come next so that an output has the form asked for."""

import functools
import json
import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import numpy.typing as npt
import torch
from llguidance.gbnf_to_lark import any_to_lark

from hotset.errors import RequestError
from hotset.foreign_text import ForeignTextError, parse_json
from hotset.grammar import json_schema
from hotset.grammar.follower import JsonFollower, TokenTable
from hotset.grammar.json_bounds import JsonBounds, JsonPosition
from hotset.grammar.nodes import SchemaError
from hotset.grammar.unique_items import UniqueItems, has_unique_items
from hotset.request import SamplingParams

# Between two JSON tokens: nothing, one space, or a line break with its indentation. Small models
# that may write any amount of whitespace often write nothing else until their budget is gone.
_COMPILE_OPTIONS = {"whitespace_pattern": r"(\n {0,16}| )?"}
_CACHED_FORMS = 64


class OutputMatcher:
    """Follows one output through its grammar.

    Attributes:
        inner: llguidance's own.
        followers: hold JSON to rules that no grammar can express.
        error: one line once the output cannot go on, or ended before it was complete.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        kind: str,
        eos_token_ids: frozenset[int],
        followers: Sequence[JsonFollower] = (),
    ) -> None:
        self.inner = matcher
        self.followers = followers
        self.error: str | None = None
        self._kind = kind
        self._eos_token_ids = eos_token_ids

    def copy(self) -> "OutputMatcher":
        """Another matcher, at the same place of the output."""
        followers = [follower.copy() for follower in self.followers]
        return OutputMatcher(self.inner.deep_copy(), self._kind, self._eos_token_ids, followers)

    def consume_token(self, token_id: int) -> None:
        """Take in the token that was chosen; sets `error` where the grammar does not allow it."""
        if self.error is not None:
            return
        if token_id in self._eos_token_ids and not self.inner.is_accepting():
            self.error = f"{self._kind} cannot be followed: the output ended before it was complete"
            return
        self.inner.consume_token(token_id)
        if self.inner.is_error():
            self.error = f"{self._kind} cannot go on: {_first_line(self.inner.get_error())}"
            return
        for follower in self.followers:
            follower.advance(token_id)
            if follower.error is not None:
                self.error = f"{self._kind} cannot be followed: {follower.error}"


class Grammars:
    """Compiles the forms of outputs and computes token masks, with llguidance.

    The wrapped tokenizer is built on first use, as that can take seconds. `check` and `matcher`
    may be called from any thread.

    Args:
        tokenizer: a fast transformers tokenizer, or None (each form is refused).
        vocab_size: V, the width of the logits; may be more than the tokenizer has.
        eos_token_ids: the tokens that are allowed once the output is complete.
        bounds: of what a JSON schema lets repeat.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        bounds: JsonBounds = JsonBounds(),  # noqa: B008  # immutable
    ) -> None:
        self._tokenizer = tokenizer
        self._bounds = bounds
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._compile = functools.lru_cache(_CACHED_FORMS)(self._compile_uncached)

    def check(self, params: SamplingParams, answers: Sequence[Sequence[int]] = ()) -> None:
        """Raise RequestError where no output can have the form that `params` ask for.

        Or where none of that form begins with the tokens of one of `answers`.
        """
        if params.ignore_eos:
            raise RequestError(
                f"ignore_eos cannot be used with {_kind(params)}: the output must end",
                param="ignore_eos",
            )
        for token_ids in answers or [()]:
            self.matcher(params, token_ids)

    def matcher(self, params: SamplingParams, token_ids: Sequence[int] = ()) -> OutputMatcher:
        """A matcher of the form that `params` ask for, of an output that has `token_ids` already.

        Raises:
            RequestError: the form is wrong, too complex or uses what is not supported; or it does
                not allow these tokens.
        """
        if params.text_form is not None:
            source = params.text_form.source
        else:
            source = _dumps(params.json_schema)
        # deep_copy of one object from two threads at once would raise.
        with self._lock:
            matcher = self._compile(_kind(params), source).copy()
        for token_id in token_ids:
            matcher.consume_token(token_id)
        if matcher.error is not None:
            raise RequestError(
                f"an output cannot go on from its {len(token_ids)} tokens: {matcher.error}",
                param="resumed",
            )
        return matcher

    def mask(self, logits: torch.Tensor, matchers: dict[int, OutputMatcher]) -> None:
        """Set the logits of all tokens that may not come next to -inf, in place.

        Args:
            logits: `[R, V]`, any device. Mutated.
            matchers: row -> its matcher; other rows are left as they are.
        """
        num_words = (self._llguidance.vocab_size + 31) // 32
        bits = torch.zeros((len(matchers), num_words), dtype=torch.int32)
        self._executor.unsafe_compute_mask_ptr(
            [(matcher.inner, i) for i, matcher in enumerate(matchers.values())],
            bits.data_ptr(),
            num_words * bits.itemsize,
            len(matchers),
        )
        for row, matcher in zip(bits.numpy(), matchers.values(), strict=True):
            self._keep_within(matcher.followers, row)
        bits = bits.to(logits.device)
        shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = (bits[:, :, None] >> shifts) & 1  # [G, V / 32, 32]
        forbidden = allowed.flatten(1)[:, : logits.shape[1]] == 0  # [G, V]
        rows = torch.tensor(list(matchers), device=logits.device)
        logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)

    def _keep_within(self, followers: Sequence[JsonFollower], row: npt.NDArray[np.int32]) -> None:
        """Take the tokens that `followers` rule out out of one row of mask bits, in place."""
        followers = [follower for follower in followers if follower.is_near]
        if not followers:
            return
        allowed = np.unpackbits(row.view(np.uint8), bitorder="little").astype(bool)
        vocab_size = self._llguidance.vocab_size
        for follower in followers:
            allowed[:vocab_size] = follower.keep_within(allowed[:vocab_size])
        row.view(np.uint8)[:] = np.packbits(allowed, bitorder="little")

    @functools.cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor()

    @functools.cached_property
    def _llguidance(self) -> llguidance.LLTokenizer:
        return llguidance.hf.from_tokenizer(
            self._tokenizer,
            n_vocab=max(self._vocab_size, len(self._tokenizer)),
            eos_token=self._eos_token_ids,
        )

    @functools.cached_property
    def _token_table(self) -> TokenTable:
        tokenizer = self._llguidance
        return TokenTable(
            [
                b"" if tokenizer.is_special_token(i) else tokenizer.decode_bytes([i])
                for i in range(tokenizer.vocab_size)
            ]
        )

    def _followers(self, kind: str, source: str) -> list[JsonFollower]:
        if kind != "json_schema":
            return []
        schema = parse_json(source)
        followers: list[JsonFollower] = []
        if has_unique_items(schema):
            followers.append(UniqueItems(schema, self._token_table))
        if self._bounds != JsonBounds():  # behind the others: a bound gives way to them
            followers.append(JsonPosition(self._bounds.widened(schema), self._token_table))
        return followers

    def _compile_uncached(self, kind: str, source: str) -> OutputMatcher:
        if self._tokenizer is None:
            raise RequestError(f"{kind} needs a tokenizer, and this model has none")
        if not self._eos_token_ids:
            raise RequestError(f"{kind} needs an end-of-sequence token; this model has none")
        try:
            tokenizer = self._llguidance
        except ValueError as error:
            raise RequestError(
                f"{kind} cannot be used with this model's tokenizer: {_first_line(error)}"
            ) from error
        try:
            grammar = _grammar(kind, source)
        except (SchemaError, ForeignTextError, _FormError) as error:
            raise RequestError(f"{kind} cannot be used: {_first_line(error)}") from error
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"{kind} cannot be used: {_first_line(matcher.get_error())}")
        if not self._has_output(matcher):
            raise RequestError(f"{kind} cannot be used: no text at all has the form asked for")
        followers = self._followers(kind, source)
        return OutputMatcher(matcher, kind, frozenset(self._eos_token_ids), followers)

    def _has_output(self, matcher: llguidance.LLMatcher) -> bool:
        """Whether a first token is allowed, or none is needed."""
        if matcher.is_accepting():
            return True
        bits = np.frombuffer(matcher.deep_copy().compute_bitmask(), np.uint32).copy()
        for token_id in self._eos_token_ids:
            bits[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        return bool(bits.any())


def _kind(params: SamplingParams) -> str:
    return "json_schema" if params.text_form is None else params.text_form.kind


def _dumps(schema: object) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError, TypeError) as error:
        raise RequestError(
            f"json_schema cannot be written as JSON: {_first_line(error)}"
        ) from error


class _FormError(Exception):
    """A form that cannot be compiled. The message is llguidance's, or one line."""


def _grammar(kind: str, source: str) -> str:
    """The grammar for llguidance. Raises SchemaError, ForeignTextError and _FormError."""
    matcher = llguidance.LLMatcher
    match kind:
        case "json_schema":
            schema = json_schema.prepare(source)
            try:
                text = matcher.grammar_from_json_schema(schema, overrides=_COMPILE_OPTIONS)
            except ValueError as error:
                raise _FormError(str(error)) from error
        case "regex":
            text = matcher.grammar_from_regex(source)
        case "choice":
            texts = parse_json(source)
            if not isinstance(texts, list) or not texts or not all(type(t) is str for t in texts):
                raise _FormError("expected a list of texts, at least one")
            quoted = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
            text = matcher.grammar_from_lark(f"start: {quoted}")
        case "grammar":
            try:
                lark = any_to_lark(source)
            except Exception as error:  # its parser raises IndexError and others, too
                raise _FormError(f"expected Lark's notation or GBNF: {error}") from error
            if "%json" in lark:  # it would bypass what `json_schema.prepare` checks and rewrites
                raise _FormError("it has %json in it; a schema can be given by itself only")
            text = matcher.grammar_from_lark(lark)
        case _:
            raise AssertionError(kind)
    grammar: str = text
    return grammar


def _first_line(error: object) -> str:
    """The first line of a message; llguidance adds the parser's whole state below it."""
    text = str(error).strip()
    if text.startswith("regex parse error"):  # the expression, a marker below it, and the reason
        return " ".join(text.split())[:300]
    return " ".join(text.partition("<state>")[0].split())[:300]
