"""Requests and responses of the OpenAI API, as far as hotset has them; no HTTP."""

import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hotset.engine.completion import Completion
from hotset.errors import RequestError
from hotset.model.prompt import PromptEncoder
from hotset.request import RequestOutput, SamplingParams, TokenLogprob

# JSON has no -Infinity.
_LEAST_LOGPROB = -9999.0

Json = dict[str, Any]
Body = TypeVar("Body", bound="GenerationRequest")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


class StreamOptions(_Part):
    """What a stream carries beside the text."""

    include_usage: bool = False


class JsonSchemaFormat(_Part):
    """A named JSON schema."""

    name: str = ""
    description: str = ""
    strict: bool = True
    schema_: Json = Field(default_factory=dict, alias="schema")


class ResponseFormat(_Part):
    """What form the output must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def schema_to_follow(self) -> Json | None:
        """The JSON schema that is asked for, if one is."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise RequestError("response_format has no json_schema")
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class GenerationRequest(_Part):
    """What both kinds of completion have in common.

    A field that is not here is refused, so that none is ignored that would change the answer;
    null is the same as absent. Beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty`,
    `stop_token_ids`, `ignore_eos` and `cache_salt`, as vLLM has them.
    """

    object_name: ClassVar[str]
    chunk_name: ClassVar[str]
    id_prefix: ClassVar[str]

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    n: int = 1
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    cache_salt: str = ""
    # Accepted, and of no effect on the answer.
    user: str | None = None
    metadata: Json | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None

    def params(self) -> SamplingParams:
        """The sampling parameters asked for. Raises RequestError where they cannot work."""
        response_format = self.response_format
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            n=self.n,
            logprobs=self.num_logprobs(),
            json_schema=None if response_format is None else response_format.schema_to_follow(),
        )

    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are asked for at each place; None is no logprobs."""
        raise NotImplementedError

    def prompts(self, encoder: PromptEncoder) -> list[list[int]]:
        """Token ids of each prompt. Raises RequestError where one cannot be encoded."""
        raise NotImplementedError

    def choice(self, index: int, completion: Completion, encoder: PromptEncoder) -> Json:
        """One entry of `choices` in a whole response."""
        raise NotImplementedError

    def chunk_choice(
        self, output: RequestOutput, encoder: PromptEncoder, *, is_first: bool
    ) -> Json:
        """One entry of `choices` in a chunk of a stream."""
        raise NotImplementedError


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    messages: list[Json]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0

    @model_validator(mode="after")
    def _newer_name_of_max_tokens(self) -> "ChatRequest":
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    def num_logprobs(self) -> int | None:
        """`top_logprobs`, where `logprobs` is set."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true")
        return self.top_logprobs if self.logprobs else None

    def prompts(self, encoder: PromptEncoder) -> list[list[int]]:
        """The one conversation, by the model's chat template."""
        return [encoder.encode_chat(self.messages)]

    def choice(self, index: int, completion: Completion, encoder: PromptEncoder) -> Json:
        """A message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion.logprobs, encoder),
            "finish_reason": completion.finish_reason,
        }

    def chunk_choice(
        self, output: RequestOutput, encoder: PromptEncoder, *, is_first: bool
    ) -> Json:
        """A part of a message; the first one names the role."""
        delta = {"role": "assistant"} if is_first else {}
        reason = output.finish_reason
        return {
            "index": output.index,
            "delta": {**delta, "content": output.text},
            "logprobs": self._logprobs(output.logprobs, encoder),
            "finish_reason": None if reason is None else reason.value,
        }

    def _logprobs(self, entries: Sequence[TokenLogprob], encoder: PromptEncoder) -> Json | None:
        if not self.logprobs:
            return None

        def entry(token_id: int, logprob: float) -> Json:
            text = encoder.decode_token(token_id)
            return {
                "token": text,
                "logprob": max(logprob, _LEAST_LOGPROB),
                "bytes": list(text.encode()),
            }

        return {
            "content": [
                {
                    **entry(one.token_id, one.logprob),
                    "top_logprobs": [entry(*top) for top in one.top],
                }
                for one in entries
            ],
            "refusal": None,
        }


class TextRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None

    def num_logprobs(self) -> int | None:
        """`logprobs`."""
        return self.logprobs

    def prompts(self, encoder: PromptEncoder) -> list[list[int]]:
        """Each text encoded; token ids as they are."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [encoder.encode_text(prompt)]
        if not prompt:
            raise RequestError("prompt is an empty list; expected at least one prompt")
        if isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        return [encoder.encode_text(p) if isinstance(p, str) else p for p in prompt]

    def choice(self, index: int, completion: Completion, encoder: PromptEncoder) -> Json:
        """A text."""
        return {
            "index": index,
            "text": completion.text,
            "logprobs": self._logprobs(completion.logprobs, encoder),
            "finish_reason": completion.finish_reason,
        }

    def chunk_choice(
        self, output: RequestOutput, encoder: PromptEncoder, *, is_first: bool
    ) -> Json:
        """A part of a text."""
        reason = output.finish_reason
        return {
            "index": output.index,
            "text": output.text,
            "logprobs": self._logprobs(output.logprobs, encoder),
            "finish_reason": None if reason is None else reason.value,
        }

    def _logprobs(self, entries: Sequence[TokenLogprob], encoder: PromptEncoder) -> Json | None:
        if self.logprobs is None:
            return None
        return {
            "tokens": [encoder.decode_token(one.token_id) for one in entries],
            "token_logprobs": [max(one.logprob, _LEAST_LOGPROB) for one in entries],
            "top_logprobs": [
                {encoder.decode_token(t): max(logprob, _LEAST_LOGPROB) for t, logprob in one.top}
                for one in entries
            ],
        }


def parse_body(kind: type[Body], data: object) -> Body:
    """Check the JSON body of a request; raises RequestError with one line."""
    if not isinstance(data, dict):
        raise RequestError(f"the body is a JSON {type(data).__name__}; expected an object")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RequestError(f"{where} is not supported") from error
        if first["type"] == "missing":
            raise RequestError(f"{where} is missing") from error
        raise RequestError(f"{where}: {first['msg']}") from error


def usage_body(completions: Sequence[Completion], num_prompts: int) -> Json:
    """Token counts over the completions of `num_prompts` prompts, `n` for each, in order."""
    n = len(completions) // num_prompts
    prompt_tokens = sum(completion.prompt_tokens for completion in completions[::n])
    completion_tokens = sum(len(completion.token_ids) for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(completion.cached_tokens for completion in completions[::n])
        },
    }


def response_body(
    request: GenerationRequest,
    request_id: str,
    model: str,
    completions: Sequence[Completion],
    encoder: PromptEncoder,
) -> Json:
    """The whole response; `completions` are `n` for each prompt, in order."""
    return {
        "id": f"{request.id_prefix}-{request_id}",
        "object": request.object_name,
        "created": int(time.time()),
        "model": model,
        "choices": [
            request.choice(index, completion, encoder)
            for index, completion in enumerate(completions)
        ],
        "usage": usage_body(completions, len(completions) // request.n),
    }


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> Json:
    """An error as the OpenAI API reports it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
