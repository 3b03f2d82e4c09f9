"""Bodies of the OpenAI Responses API, and how they become chats."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from hotset.errors import RequestError
from hotset.server.body import Json, Part, parse_body
from hotset.server.schemas import ChatRequest, StreamOptions
from hotset.server.tools import OtherTool, tool_tag
from hotset.server.validation import missing

# A chat's field -> the field it comes from, for errors.
FIELD_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_LOGPROBS = "message.output_text.logprobs"


class InputText(Part):
    """Text of a message."""

    type: Literal["input_text", "text"]
    text: str


class OutputText(Part):
    """Text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Json] = Field(default_factory=list)
    logprobs: list[Json] = Field(default_factory=list)


class Refusal(Part):
    """An answer that is none."""

    type: Literal["refusal"]
    refusal: str


AnyPart = Annotated[InputText | OutputText | Refusal, Discriminator("type")]


class MessageItem(Part):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[AnyPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def text(self) -> str:
        """All of its text."""
        if isinstance(self.content, str):
            return self.content
        texts = [one.refusal if isinstance(one, Refusal) else one.text for one in self.content]
        return "".join(texts)


class CallItem(Part):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class ResultItem(Part):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None


class ReasoningItem(Part):
    """What a model thought: left out, as chat templates leave it out."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["reasoning"]


def _item_tag(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    return kind if isinstance(kind, str) else "message"


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_tag),
]


class FunctionTool(Part):
    """A function the model may call."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=128)
    description: str = ""
    parameters: Json | None = None
    strict: bool = False


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function tool")] | Annotated[OtherTool, Tag("other tool")],
    Discriminator(tool_tag),
]


class ChosenFunction(Part):
    """The function to call."""

    type: Literal["function"]
    name: str


class TextFormat(Part):
    """What form the text must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str = ""
    strict: bool = True
    schema_: Json | None = Field(default=None, alias="schema")


class TextConfig(Part):
    """How the text is to be."""

    format: TextFormat = Field(default_factory=lambda: TextFormat(type="text"))
    verbosity: Literal["medium"] = "medium"


class Reasoning(Part):
    """How much the model is to think, where its chat template has a place for that."""

    effort: str | None = None
    summary: str | None = None  # of no effect: thoughts are a part of the text here
    generate_summary: str | None = None


class ResponsesRequest(Part):
    """Body of POST /v1/responses."""

    model: str | None = None
    input: str | list[AnyItem]
    instructions: str = ""
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float = 1.0
    top_p: float = 1.0
    tools: list[AnyTool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = Field(default_factory=TextConfig)
    reasoning: Reasoning = Field(default_factory=Reasoning)
    top_logprobs: int = Field(default=0, ge=0, le=20)
    include: list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    store: bool = False
    truncation: Literal["disabled"] = "disabled"
    background: bool = False
    cache_salt: str = ""
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    # Accepted, and of no effect on the answer.
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    client_metadata: Json | None = None
    max_tool_calls: int | None = None  # of tools that a server runs
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def has_logprobs(self) -> bool:
        """Whether the text comes with log-probabilities."""
        return bool(self.top_logprobs) or _LOGPROBS in self.include

    def items(self) -> list[Json]:
        """The input as items."""
        if isinstance(self.input, str):
            content = [{"type": "input_text", "text": self.input}]
            return [{"type": "message", "role": "user", "content": content}]
        return [item.model_dump(exclude_none=True) for item in self.input]

    def chat(self, earlier: list[Json]) -> ChatRequest:
        """The chat that it is, with the items of a conversation `earlier`.

        Raises:
            RequestError: it asks for what cannot be done.
        """
        if self.background:
            raise RequestError(
                "background is true; expected false: an answer is made while one waits for it",
                param="background",
                code="unsupported_parameter",
            )
        items = [*earlier, *self.items()]
        body: Json = {
            "model": self.model,
            "messages": chat_messages(self.instructions, items),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_chat_tool(tool) for tool in self.tools],
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._response_format(),
            "reasoning_effort": self.reasoning.effort,
            "logprobs": self.has_logprobs,
            "top_logprobs": self.top_logprobs,
            "stream": self.stream,
            "cache_salt": self.cache_salt,
            "timeout_s": self.timeout_s,
        }
        choice = self.tool_choice
        if isinstance(choice, ChosenFunction):
            body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            body["tool_choice"] = choice
        return parse_body(ChatRequest, body)

    def _response_format(self) -> Json | None:
        form = self.text.format
        if form.type != "json_schema":
            return {"type": form.type}
        if form.schema_ is None:
            raise missing("text.format.schema")
        return {"type": form.type, "json_schema": {"name": form.name, "schema": form.schema_}}


def chat_messages(instructions: str, items: list[Json]) -> list[Json]:
    """The messages of a chat: a turn's text and its calls are one message of the assistant."""
    messages: list[Json] = []
    if instructions:
        messages.append({"role": "developer", "content": instructions})
    for data in items:
        item = parse_body(_Item, {"item": data}).item
        last = messages[-1] if messages else {}
        if isinstance(item, MessageItem):
            messages.append({"role": item.role, "content": item.text()})
        elif isinstance(item, CallItem):
            if last.get("role") != "assistant":
                last = {"role": "assistant", "content": None}
                messages.append(last)
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            last["tool_calls"] = [*last.get("tool_calls", ()), call]
        elif isinstance(item, ResultItem):
            output = item.output
            text = output if isinstance(output, str) else "".join(one.text for one in output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
    if not messages:
        raise RequestError("input is empty; expected at least one item", param="input")
    return messages


class _Item(Part):
    """One item, as it was sent or stored."""

    item: AnyItem


def _chat_tool(tool: FunctionTool | OtherTool) -> Json:
    if isinstance(tool, OtherTool):
        return {"type": tool.type}  # skipped there, with a warning
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: getattr(tool, name) for name in names}}
