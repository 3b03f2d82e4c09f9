"""Requests of the OpenAI API, as far as hotset has them, and of its neighbours; no HTTP."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    PrivateAttr,
    model_validator,
)

from hotset.errors import RequestError
from hotset.request import SamplingParams, TextForm
from hotset.server.body import Json, Part
from hotset.server.not_done import OF_CHATS, OF_TEXTS, Known, without_not_done
from hotset.server.output_forms import FormFields, OutputForm
from hotset.server.tools import NamedTool, ToolUser
from hotset.server.validation import shown
from hotset.text.forced_calls import forced_schema
from hotset.text.prompt import PromptEncoder


class StreamOptions(Part):
    """What a stream carries beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # of no effect: there is none


class JsonSchemaFormat(Part):
    """A named JSON schema."""

    name: str = ""
    description: str = ""
    strict: bool = True
    schema_: Json = Field(default_factory=dict, alias="schema")


class ResponseFormat(Part):
    """What form the output must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def schema_to_follow(self) -> Json | None:
        """The JSON schema that is asked for, if one is."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise RequestError(
                    "response_format has no json_schema",
                    param="response_format.json_schema",
                    code="missing_required_parameter",
                )
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class GenerationRequest(FormFields, Part):
    """What both kinds of completion have in common.

    A field that is not here is refused, so that no field that would change the answer is ignored.
    Fields of `not_done` are taken at values that ask for nothing. Beyond OpenAI's: `top_k`,
    `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`, `include_stop_str_in_output`,
    `skip_special_tokens`, `ignore_eos`, `prompt_logprobs`, `cache_salt` and the fields of
    `FormFields`, as vLLM has them, and `timeout_s`.
    """

    object_name: ClassVar[str]
    chunk_name: ClassVar[str]
    id_prefix: ClassVar[str]
    prompt_param: ClassVar[str]  # the field that the prompt comes from
    not_done: ClassVar[Known]

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    logit_bias: dict[str, float] = Field(default_factory=dict)
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    n: int = 1
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    cache_salt: str = ""
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    # Accepted, and of no effect on the answer.
    user: str | None = None
    metadata: Json | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _what_is_not_done(cls, data: Any) -> Any:
        return without_not_done(data, cls.not_done) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _usage_goes_on_with_usage(self) -> Self:
        if self.stream_options.continuous_usage_stats and not self.stream_options.include_usage:
            raise RequestError(
                "stream_options.continuous_usage_stats needs include_usage to be true",
                param="stream_options.continuous_usage_stats",
            )
        return self

    def params(self) -> SamplingParams:
        """The sampling parameters asked for. Raises RequestError where they cannot work."""
        form = next(iter(self.forms().values()), None)
        same = SamplingParams.__dataclass_fields__.keys() & type(self).model_fields
        values = {name: getattr(self, name) for name in same} | {
            "top_k": 0 if self.top_k == -1 else self.top_k,  # off, in vLLM's words
            "logit_bias": _biases(self.logit_bias),
            "logprobs": self.num_logprobs(),
            "prompt_logprobs": self.num_prompt_logprobs(),
            "json_schema": form if isinstance(form, dict) else None,
            "text_form": form if isinstance(form, TextForm) else None,
        }
        return SamplingParams(**values)

    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are asked for at each place; None is no logprobs."""
        raise NotImplementedError

    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError(
                "prompt_logprobs cannot be streamed; expected stream to be false",
                param="prompt_logprobs",
                code="unsupported_parameter",
            )
        return self.prompt_logprobs

    def forms(self) -> dict[str, OutputForm]:
        """The form that the output must have, by the field that asks for it; empty for any.

        Raises RequestError where there are several, or one that cannot be read.
        """
        forms = self.asked_forms()
        if self.response_format is not None:
            schema = self.response_format.schema_to_follow()
            if schema is not None:
                forms["response_format"] = schema
        if len(forms) > 1:
            first, second, *_ = sorted(forms)
            raise RequestError(
                f"{first} and {second} both say what form the output has; expected one of them",
                param=first,
            )
        return forms

    @property
    def schema_param(self) -> str:
        """The field that the form comes from."""
        return next(iter(self.forms()), "response_format")

    def schemas(self) -> list[object]:
        """The JSON schemas of the request as its sender wrote them, and sources of other forms."""
        return [
            form.source if isinstance(form, TextForm) else form for form in self.forms().values()
        ]

    _notes: list[str] = PrivateAttr(default_factory=list)

    def note(self, text: str) -> None:
        """Add a line to `warning`."""
        self._notes.append(text)

    def warning(self) -> str | None:
        """One line about what is not done as asked, if anything is."""
        return "; ".join(self._notes) or None

    def num_prompts(self) -> int:
        """How many prompts there are."""
        return 1

    def prompts(self, encoder: PromptEncoder) -> list[list[int]]:
        """Token ids of each prompt. Raises RequestError where one cannot be encoded."""
        raise NotImplementedError


class ChatRequest(ToolUser, GenerationRequest):
    """Body of POST /v1/chat/completions."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    prompt_param = "messages"
    not_done = OF_CHATS

    messages: list[Json]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    chat_template_kwargs: Json = Field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _one_way_to_go_on(self) -> Self:
        if self.continue_final_message and "add_generation_prompt" not in self.model_fields_set:
            self.add_generation_prompt = False
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "add_generation_prompt and continue_final_message are both true; expected one",
                param="continue_final_message",
            )
        return self

    @model_validator(mode="after")
    def _newer_name_of_max_tokens(self) -> "ChatRequest":
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"{name} is {self.max_tokens}; expected 1 or more", param=name)
        return self

    @property
    def reads_tools(self) -> bool:
        """Whether the output may have calls in it."""
        free = self.tool_choice in (None, "auto") and not self.forms()
        return bool(self.tools) and free

    @property
    def forces_tools(self) -> bool:
        """Whether the output is made to be nothing but calls."""
        return self.tool_choice == "required" or self.forced_name is not None

    @property
    def forced_name(self) -> str | None:
        """The one tool to call, where the request names it."""
        chosen = self.tool_choice
        return chosen.function.name if isinstance(chosen, NamedTool) else None

    def num_logprobs(self) -> int | None:
        """`top_logprobs`, where `logprobs` is set."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return self.top_logprobs if self.logprobs else None

    def forms(self) -> dict[str, OutputForm]:
        """The schema of forced calls; otherwise of the `response_format`."""
        forms = super().forms()
        if not self.forces_tools:
            return forms
        if not self.tools:
            message = "tool_choice asks for a call but there are no tools to call"
            why = f"; {self.skipped_tools}" if self.skipped_tools else ""
            raise RequestError(f"{message}{why}", param="tool_choice")
        for name in forms:
            raise RequestError(
                f"tool_choice forces a call, so {name} cannot be followed", param=name
            )
        functions = [tool.function.model_dump() for tool in self.tools]
        parallel = self.parallel_tool_calls
        return {"tools": forced_schema(functions, name=self.forced_name, parallel=parallel)}

    @property
    def schema_param(self) -> str:
        """That of the form, if there is one; otherwise the tools."""
        return next(iter(self.forms()), "tools")

    def schemas(self) -> list[object]:
        """Of the form and of the tools."""
        return super().schemas() + [tool.function.parameters or {} for tool in self.tools]

    def warning(self) -> str | None:
        """Also about tools that are skipped, or cannot be called."""
        uncalled = None
        if (
            self.tools
            and self.tool_choice != "none"
            and not (self.reads_tools or self.forces_tools)
        ):
            uncalled = "no tool can be called, as the output has to follow a form"
        return "; ".join(filter(None, (self.skipped_tools, uncalled, super().warning()))) or None

    def prompts(self, encoder: PromptEncoder) -> list[list[int]]:
        """The one conversation, by the model's chat template."""
        tools = [] if self.tool_choice == "none" else self.tools
        options = dict(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            options["reasoning_effort"] = self.reasoning_effort
        return [
            encoder.encode_chat(
                self.messages,
                tools=[tool.model_dump(exclude_defaults=True) for tool in tools],
                template_options=options,
                add_generation_prompt=self.add_generation_prompt,
                continue_final_message=self.continue_final_message,
            )
        ]


class TextRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"
    prompt_param = "prompt"
    not_done = OF_TEXTS

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _what_is_not_there(self) -> "TextRequest":
        if self.best_of not in (None, self.n):
            message = f"best_of is {self.best_of} and n is {self.n}; they must be the same"
            raise RequestError(message, param="best_of")
        return self

    def num_logprobs(self) -> int | None:
        """`logprobs`."""
        return self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        """The more of `prompt_logprobs` and, where the prompt is echoed, `logprobs`."""
        wanted = [super().num_prompt_logprobs(), self.logprobs if self.echo else None]
        return max((one for one in wanted if one is not None), default=None)

    def prompts(self, encoder: PromptEncoder) -> list[list[int]]:
        """Each text encoded; token ids as they are."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [encoder.encode_text(prompt)]
        if not prompt:
            raise RequestError(
                "prompt is an empty list; expected at least one prompt", param="prompt"
            )
        if isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        return [encoder.encode_text(p) if isinstance(p, str) else p for p in prompt]

    def num_prompts(self) -> int:
        """How many prompts there are."""
        prompt = self.prompt
        return (
            1 if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else len(prompt)
        )


class TokenizeRequest(ToolUser):
    """Body of POST /tokenize: a text, or a chat by the model's template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Json] = Field(default_factory=list)

    def token_ids(self, encoder: PromptEncoder) -> list[int]:
        """Of the text or the chat."""
        if (self.prompt is None) == (not self.messages):
            raise RequestError("give either a prompt or messages", param="prompt")
        if self.prompt is not None:
            return encoder.encode_text(self.prompt)
        tools = [tool.model_dump(exclude_defaults=True) for tool in self.tools]
        return encoder.encode_chat(self.messages, tools=tools)


class DetokenizeRequest(Part):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class BatchRequest(Part):
    """Body of POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"] = "24h"
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    """Of token ids, which JSON has as strings."""
    for name in given:
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise RequestError(
                f"logit_bias has {shown(name)}; expected token ids, as strings", param="logit_bias"
            )
    return {int(name): bias for name, bias in given.items()}
