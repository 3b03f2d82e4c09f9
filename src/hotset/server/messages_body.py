"""Bodies of the Anthropic Messages API, and how they become chats."""

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from hotset.errors import RequestError
from hotset.server.body import Json, Part, parse_body
from hotset.server.schemas import ChatRequest
from hotset.server.tools import OtherTool
from hotset.server.validation import missing, shown

_BILLING = "x-anthropic-billing-header:"
# A chat's field -> the field it comes from, for errors.
FIELD_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}


class Block(Part):
    """A part of a message's content. Prefixes are cached with or without `cache_control`."""

    cache_control: Json | None = None


class TextBlock(Block):
    """Text."""

    type: Literal["text"]
    text: str
    citations: list[Json] = Field(default_factory=list)  # of an answer; the text has them


class ToolUseBlock(Block):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Json
    caller: Json | None = None


class ToolResultBlock(Block):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[TextBlock, Field()]] = ""
    is_error: bool = False


class ThinkingBlock(Block):
    """What the model thought before it answered."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Block):
    """Thoughts that only Anthropic can read: left out."""

    type: Literal["redacted_thinking"]
    data: str = ""


AnyBlock = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock,
    Discriminator("type"),
]


class Message(Part):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]

    def blocks(self) -> list[AnyBlock]:
        """The content as blocks."""
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content


class MessageTool(Part):
    """A tool that the client runs."""

    type: Literal["custom"] = "custom"
    name: str = Field(min_length=1, max_length=128)
    description: str = ""
    input_schema: Json
    strict: bool = False
    cache_control: Json | None = None
    eager_input_streaming: bool = False  # arguments stream as they grow in any case


def _tool_tag(tool: Any) -> str:
    kind = tool.get("type") or "custom" if isinstance(tool, dict) else "custom"
    return "other tool" if isinstance(kind, str) and kind != "custom" else "custom tool"


AnyTool = Annotated[
    Annotated[MessageTool, Tag("custom tool")] | Annotated[OtherTool, Tag("other tool")],
    Discriminator(_tool_tag),
]


class ToolChoice(Part):
    """Whether, and which, tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Part):
    """Whether the model is to think before it answers."""

    type: Literal["disabled", "enabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Part):
    """The output is JSON of a schema."""

    type: Literal["json_schema"]
    schema_: Json = Field(alias="schema")


class OutputConfig(Part):
    """How the output is to be."""

    effort: str | None = None
    format: JsonFormat | None = None


class ContextManagement(Part):
    """What is to be left out of a long context."""

    edits: list[Json] = Field(default_factory=list)


class CountTokensRequest(Part):
    """Body of POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: list[Message]
    system: str | list[TextBlock] = ""
    tools: list[AnyTool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = Field(default_factory=OutputConfig)
    output_format: JsonFormat | None = None  # what came before `output_config.format`
    context_management: ContextManagement = Field(default_factory=ContextManagement)
    # Accepted, and of no effect on the answer.
    cache_control: Json | None = None

    def chat(self) -> ChatRequest:
        """The chat that it is. Raises RequestError where it cannot be one."""
        return parse_body(ChatRequest, self._chat_body())

    def _chat_body(self) -> Json:
        self._check_edits()
        options: Json = {}
        if self.thinking is not None:  # the switch that templates have, by its usual name
            options["enable_thinking"] = self.thinking.type != "disabled"
        body: Json = {
            "model": self.model,
            "messages": chat_messages(self.system, self.messages),
            "tools": [_chat_tool(tool) for tool in self.tools],
            "chat_template_kwargs": options,
            "reasoning_effort": self.output_config.effort,
        }
        last = body["messages"][-1] if body["messages"] else {}
        if last.get("role") == "assistant":  # its beginning is given
            if last.get("tool_calls") or not last["content"].strip():
                raise RequestError(
                    "the last message is the assistant's and does not end with a text to go on "
                    "from; expected one, or a message of the user",
                    param="messages",
                )
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        form = self.output_config.format or self.output_format
        if form is not None:
            schema = {"name": "output", "schema": form.schema_}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        choice = self.tool_choice
        if choice is not None:
            body["parallel_tool_calls"] = not choice.disable_parallel_tool_use
            body["tool_choice"] = {"any": "required"}.get(choice.type, choice.type)
            if choice.type == "tool":
                if choice.name is None:
                    raise missing("tool_choice.name")
                body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        return body

    def _check_edits(self) -> None:
        """Thoughts are left out by chat templates; nothing else is left out here."""
        for i, edit in enumerate(self.context_management.edits):
            kind = edit.get("type")
            if not isinstance(kind, str) or not kind.startswith("clear_thinking_"):
                name = f"context_management.edits.{i}.type"
                message = f"{name} is {shown(kind)}; expected clear_thinking_20251015"
                raise RequestError(message, param=name, code="unsupported_parameter")


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] = Field(default_factory=list)
    temperature: float = Field(default=1.0, ge=0, le=1)
    top_p: float = 1.0
    top_k: int = 0
    stream: bool = False
    # Accepted, and of no effect on the answer.
    metadata: Json | None = None
    service_tier: str | None = None
    diagnostics: Json | None = None

    def _chat_body(self) -> Json:
        names = ("max_tokens", "temperature", "top_p", "top_k", "stream")
        body = super()._chat_body() | {name: getattr(self, name) for name in names}
        return body | {"stop": self.stop_sequences}

    def chat(self) -> ChatRequest:
        """The chat that it is, with a note where it asks for what is not as Anthropic has it."""
        chat = super().chat()
        if self.thinking is not None and self.thinking.type != "disabled":
            chat.note(
                f"thinking of type {self.thinking.type} is up to the model's chat template "
                "(enable_thinking); thoughts are a part of the text, without a budget"
            )
        return chat


def chat_messages(system: str | list[TextBlock], turns: list[Message]) -> list[Json]:
    """The messages of a chat.

    Blocks of text are joined with a blank line between them, and so are turns of one role that
    follow each other, which are one turn for Anthropic. A result of a tool is a message.
    """
    blocks = [TextBlock(type="text", text=system)] if isinstance(system, str) else system
    text = _joined([block for block in map(_without_billing, blocks) if block.text])
    messages: list[Json] = [{"role": "system", "content": text}] if text else []
    for turn in turns:
        for message in _assistant(turn) if turn.role == "assistant" else _others(turn):
            last = messages[-1] if messages else None
            if last is None or last["role"] != message["role"] or "tool_call_id" in message:
                messages.append(message)
                continue
            parts = [part for part in (last["content"], message["content"]) if part]
            last["content"] = "\n\n".join(parts)
            if calls := message.get("tool_calls"):
                last["tool_calls"] = last.get("tool_calls", []) + calls
    return messages


def _assistant(turn: Message) -> list[Json]:
    blocks = turn.blocks()
    if any(isinstance(block, ToolResultBlock) for block in blocks):
        raise RequestError("a message of the assistant has a tool_result", param="messages")
    message: Json = {"role": "assistant", "content": _joined(blocks)}
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    if thoughts:
        message["reasoning_content"] = "\n\n".join(thoughts)
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {
                "name": block.name,
                "arguments": json.dumps(block.input, ensure_ascii=False),
            },
        }
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    return [{**message, "tool_calls": calls} if calls else message]


def _others(turn: Message) -> list[Json]:
    """The messages of a turn of the user, or of the system, in the order of its blocks."""
    messages: list[Json] = []
    texts: list[AnyBlock] = []
    for block in turn.blocks():
        if turn.role == "system" and isinstance(block, TextBlock):
            block = _without_billing(block)
        if isinstance(block, ToolUseBlock):
            raise RequestError(f"a message of the {turn.role} has a tool_use", param="messages")
        if not isinstance(block, ToolResultBlock):
            texts.append(block)
            continue
        if texts:
            messages.append({"role": turn.role, "content": _joined(texts)})
            texts = []
        content = block.content if isinstance(block.content, str) else _joined(block.content)
        if block.is_error:
            content = f"Error: {content}"
        messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
    if texts or not messages:
        messages.append({"role": turn.role, "content": _joined(texts)})
    return messages


def _without_billing(block: TextBlock) -> TextBlock:
    """The block without the line at its start that Claude Code writes for Anthropic's billing.

    It has a hash of the request, so that no prefix of a conversation would be found again.
    Source: https://github.com/anthropics/claude-code/issues/68900
    """
    if not block.text.startswith(_BILLING):
        return block
    return TextBlock(type="text", text=block.text.partition("\n")[2])


def _joined(blocks: list[Any]) -> str:
    return "\n\n".join(block.text for block in blocks if isinstance(block, TextBlock))


def _chat_tool(tool: MessageTool | OtherTool) -> Json:
    if isinstance(tool, OtherTool):
        return {"type": tool.type}  # skipped there, with a warning
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}
