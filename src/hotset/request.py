"""What users ask for and what comes back: plain data. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple

from hotset.errors import ConfigError, RequestError
from hotset.option_fields import Bounds, option, options_of

MOST_BIASES = 1024  # tokens in a `logit_bias`
_PENALTY, _LOGPROBS = Bounds("-2 to 2", -2, 2), Bounds("0 to 20", 0, 20)


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

    A field is declared as an option is: its type, bounds and meaning once. Numbers of other
    libraries become Python's, a stop string may stand alone, and lists are taken for tuples.

    Raises:
        RequestError: a value that its field does not take, or fields that do not go together;
            `param` is the field.
    """

    max_tokens: int | None = option(
        256,
        "Most tokens to generate.",
        bounds=Bounds("0 or more", 0),
        otherwise="up to the context limit",
        more="0 only computes the prompt.",
    )
    min_tokens: int = option(
        0,
        "Least tokens to generate before the text may end.",
        bounds=Bounds("0 to max_tokens", 0),
        more="Neither an end-of-sequence id nor one of `stop_token_ids` comes before them; `stop` "
        "is looked for in the text after them.",
    )
    temperature: float = option(0.0, "0 is greedy.", bounds=Bounds("0 (greedy) to 100", 0, 100))
    top_p: float = option(
        1.0,
        "Nucleus sampling; 1 is off.",
        bounds=Bounds("above 0, at most 1", 0, 1, is_open=True),
    )
    top_k: int = option(
        0, "Sample of the likeliest; 0 is off.", bounds=Bounds("0 (off) or more", 0)
    )
    min_p: float = option(
        0.0,
        "Least probability relative to the likeliest token; 0 is off.",
        bounds=Bounds("0 to 1", 0, 1),
    )
    repetition_penalty: float = option(
        1.0,
        "Divides (multiplies) positive (negative) logits of tokens of prompt and output; 1 is off.",
        bounds=Bounds("above 0, at most 100", 0, 100, is_open=True),
        more="Source: Keskar et al., CTRL, section 4.1.",
    )
    presence_penalty: float = option(
        0.0, "Subtracted once for each token of the output.", bounds=_PENALTY
    )
    frequency_penalty: float = option(
        0.0, "Subtracted for each occurrence of a token in the output.", bounds=_PENALTY
    )
    logit_bias: Mapping[int, float] = option(
        dict,
        "Token id -> what is added to its logit, -100 to 100.",
        has_flag=False,
    )
    seed: int | None = option(
        None,
        "Makes a sampled request reproducible.",
        otherwise="one is drawn",
        has_flag=False,
    )
    stop: tuple[str, ...] = option(
        (), "A string that ends the output, and is no part of its text; there may be several."
    )
    stop_token_ids: tuple[int, ...] = option(
        (), "Ids that end the output, beside the model's own.", has_flag=False
    )
    include_stop_str_in_output: bool = option(
        False, "End the text with the stop string or token that was met.", flag="--include-stop"
    )
    skip_special_tokens: bool = option(
        True, "Leave special tokens out of the text.", has_flag=False
    )
    ignore_eos: bool = option(
        False, "Go on past the model's end-of-sequence ids (for benchmarks).", has_flag=False
    )
    logprobs: int | None = option(
        None,
        "Return the tokens' log-probabilities, and this number of the likeliest ones.",
        bounds=_LOGPROBS,
        otherwise="off",
        has_flag=False,
    )
    prompt_logprobs: int | None = option(
        None,
        "The same for the tokens of the prompt, all but the first.",
        bounds=_LOGPROBS,
        otherwise="off",
        more="Such a prompt is computed whole, whatever is cached of it.",
        has_flag=False,
    )
    n: int = option(
        1, "Outputs for the same prompt.", bounds=Bounds("1 to 128", 1, 128), has_flag=False
    )
    json_schema: dict[str, Any] | None = option(
        None,
        "The output must be JSON of this schema (`{}`: any JSON).",
        has_flag=False,
    )
    text_form: TextForm | None = option(
        None,
        "The output must have this form. Not together with `json_schema`.",
        has_flag=False,
    )

    def __post_init__(self) -> None:
        for one in options_of(SamplingParams):
            value = getattr(self, one.name)
            if value is one.default:  # most are
                continue
            try:
                object.__setattr__(self, one.name, one.check(value))
            except ConfigError as error:
                raise RequestError(str(error), param=one.name) from None
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; expected 0 to max_tokens", param="min_tokens"
            )
        self._check_biases()
        if not all(self.stop):
            raise RequestError(f"stop is {self.stop!r}; expected non-empty strings", param="stop")
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

    def _check_biases(self) -> None:
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


@dataclass(frozen=True, slots=True)
class Resumed:
    """An output that goes on from tokens that an engine has chosen before.

    Attributes:
        index: which of the `n` outputs of its request it is.
        token_ids: of the output so far, all that were delivered; may be empty. Its next
            `RequestOutput` has the text, tokens and log-probabilities that follow.
    """

    index: int
    token_ids: Sequence[int] = ()


class FinishReason(Enum):
    """Why a request ended; the values are the OpenAI API's where it has one.

    MOVED is no end for the user: the engine drains, and the output is to go on elsewhere from the
    tokens that were delivered (`Resumed`). Text that was held back, as a stop string may begin
    with it, comes from there.
    """

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    MOVED = "moved"


class TokenLogprob(NamedTuple):
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


# What an output's `code` may be: a program's name for an error that is no failed step.
NOT_AVAILABLE, POISONED = "not_available", "request_poisoned"


class RequestOutput(NamedTuple):
    """What one step added to one request. A tuple: thousands per second go through a pipe.

    Attributes:
        index: which of the `n` outputs of the request this is.
        text: the text that is new since the last output (a stop string is never part of it).
        token_ids: the tokens that are new.
        finish_reason: None while the request goes on; this is the last output otherwise.
        error: one line, where `finish_reason` is ERROR.
        code: of such an error, None where a step has failed; see `NOT_AVAILABLE`.
        prompt_logprobs: of all tokens of the prompt but the first, where they were asked for; in
            the first output of all `n`, which is of index 0 unless that one failed.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # of `tuple.index`
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    code: str | None = None
