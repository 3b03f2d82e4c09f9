"""What users ask for and what comes back: plain data. Imports no torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from hotset.errors import RequestError
from hotset.plain_values import (
    flag,
    json_object,
    number,
    numbers_by_id,
    texts,
    whole_number,
    whole_numbers,
)

MOST_BIASES = 1024  # tokens in a `logit_bias`


@dataclass(frozen=True, slots=True)
class TextForm:
    """A form that an output must have, other than a JSON schema.

    Attributes:
        kind: `regex`, for the whole output; `choice`, one of several texts; `grammar`, in Lark's
            notation or in GBNF (`::=`).
        source: the expression or the grammar; the texts as a JSON list.
    """

    kind: Literal["regex", "choice", "grammar"]
    source: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names and meanings follow the OpenAI API.

    Attributes:
        max_tokens: most tokens to generate; None means up to the context limit. 0 only computes
            the prompt.
        min_tokens: no end-of-sequence id and none of `stop_token_ids` before this many tokens;
            `stop` is looked for in the text after them.
        temperature: 0 is greedy.
        top_p: nucleus sampling; 1 is off.
        top_k: 0 is off.
        min_p: least probability relative to the likeliest token; 0 is off.
        repetition_penalty: divides (multiplies) positive (negative) logits of tokens of the prompt
            and the output (Keskar et al., CTRL, section 4.1); 1 is off.
        presence_penalty: subtracted once for each token of the output.
        frequency_penalty: subtracted for each occurrence of a token in the output.
        logit_bias: token id -> what is added to its logit, -100 to 100.
        seed: makes a sampled request reproducible; None draws one.
        stop: strings that end the output; they are not part of its text.
        stop_token_ids: ids that end the output, beside the model's own.
        include_stop_str_in_output: end the text with the stop string or token that was met.
        skip_special_tokens: leave special tokens out of the text.
        ignore_eos: go on past the model's end-of-sequence ids (for benchmarks).
        logprobs: None is off; otherwise also return this many of the likeliest tokens.
        prompt_logprobs: the same for the tokens of the prompt, all but the first. Such a prompt is
            computed whole, whatever is cached of it.
        n: how many outputs for the same prompt.
        json_schema: the output must be JSON of this schema (`{}`: any JSON).
        text_form: the output must have this form. Not together with `json_schema`.
    """

    max_tokens: int | None = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    json_schema: dict[str, Any] | None = None
    text_form: TextForm | None = None

    def __post_init__(self) -> None:
        self._check_types()

        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                value = getattr(self, name)
                raise RequestError(f"{name} is {value!r}; expected {expected}", param=name)

        check(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "0 or more")
        most = math.inf if self.max_tokens is None else max(0, self.max_tokens)
        check(0 <= self.min_tokens <= most, "min_tokens", "0 to max_tokens")
        check(0.0 <= self.temperature <= 100.0, "temperature", "0 (greedy) to 100")
        check(0.0 < self.top_p <= 1.0, "top_p", "above 0, at most 1")
        check(self.top_k >= 0, "top_k", "0 (off) or more")
        check(0.0 <= self.min_p <= 1.0, "min_p", "0 to 1")
        check(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "above 0, at most 100")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "-2 to 2")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "-2 to 2")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= 20, name, "0 to 20")
        if len(self.logit_bias) > MOST_BIASES:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} tokens; expected at most {MOST_BIASES}",
                param="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias of token {token_id} is {bias!r}; expected -100 to 100",
                    param="logit_bias",
                )
        check(1 <= self.n <= 128, "n", "1 to 128")
        check(all(self.stop), "stop", "non-empty strings")
        if self.json_schema is not None and self.text_form is not None:
            raise RequestError(
                f"json_schema and {self.text_form.kind} are both given; expected one"
            )

        if self.min_tokens and self.has_form:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, and the output has a form to follow, which says "
                "where it ends; expected one of both",
                param="min_tokens",
            )

    def _check_types(self) -> None:
        """Refuse values of other types than their field's; numbers of others become Python's.

        A stop string may stand alone, and lists are taken for tuples.
        """
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for names, kind, expected in _KINDS:
            for name in names:
                value = getattr(self, name)
                if value is None and name in _MAY_BE_NONE:
                    continue
                try:
                    object.__setattr__(self, name, kind(value))
                except (TypeError, ValueError, OverflowError):
                    raise RequestError(
                        f"{name} is {value!r}; expected {expected}", param=name
                    ) from None

    @property
    def has_form(self) -> bool:
        """Whether not every text may be the output."""
        return self.json_schema is not None or self.text_form is not None

    @property
    def has_penalties(self) -> bool:
        """Whether any of the three penalties changes a logit."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _form(value: object) -> TextForm:
    if not isinstance(value, TextForm):
        raise TypeError
    return value


_MAY_BE_NONE = frozenset(
    {"max_tokens", "seed", "logprobs", "prompt_logprobs", "json_schema", "text_form"}
)
# Fields of `SamplingParams`, what makes a value theirs or raises TypeError, and what is expected.
_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], object], str], ...] = (
    (
        ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "n"),
        whole_number,
        "a whole number",
    ),
    (
        (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ),
        number,
        "a number",
    ),
    (
        ("include_stop_str_in_output", "skip_special_tokens", "ignore_eos"),
        flag,
        "True or False",
    ),
    (("stop",), texts, "a text or a list of texts"),
    (("stop_token_ids",), whole_numbers, "a list of token ids"),
    (("logit_bias",), numbers_by_id, "numbers by token id"),
    (("json_schema",), json_object, "a JSON schema as a dict"),
    (("text_form",), _form, "a TextForm"),
)


class FinishReason(Enum):
    """Why a request ended; the values are the OpenAI API's where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a token, and of the likeliest ones at its place.

    Attributes:
        top: token ids with their log-probabilities, the likeliest first.
        text_offset: index in the output's text of the character that the token begins with, or
            goes on with.
        rank: of tokens of prompts, 1 is the likeliest.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    text_offset: int = 0
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to one request.

    Attributes:
        index: which of the `n` outputs of the request this is.
        text: the text that is new since the last output (a stop string is never part of it).
        token_ids: the tokens that are new.
        finish_reason: None while the request goes on; this is the last output otherwise.
        error: one line, where `finish_reason` is ERROR.
        prompt_logprobs: of all tokens of the prompt but the first, where they were asked for; in
            the first output of all `n`, which is of index 0 unless that one failed.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
