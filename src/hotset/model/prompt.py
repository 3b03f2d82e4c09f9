"""From prompts and chats to token ids."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hotset.errors import RequestError
from hotset.model.loader import LoadedModel
from hotset.model.tool_calls import HERMES_END, HERMES_START, MARKERS

Message = Mapping[str, Any]


class PromptEncoder:
    """Encodes text and chats for one model. May be used from any thread.

    Raises:
        ModelError: the model has no tokenizer.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._tokenizer = model.require_tokenizer()
        self._name = model.name
        # The tokenizer object sets these on each call, which other threads' calls would see.
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._template = str(self._tokenizer.chat_template or "")
        self._reserved = inspect.signature(self._tokenizer.apply_chat_template).parameters.keys()
        # Tool-call markers that are special tokens: the text of an output leaves them out.
        self.marker_ids = {
            token_id: token.content
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special and token.content in MARKERS
        }

    def encode_text(self, text: str) -> list[int]:
        """Encode a text as it is, with the tokens that the model wants at a text's start."""
        ids: list[int] = self._backend.encode(_utf8(text)).ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Encode a conversation with the model's chat template, up to where it would answer.

        Args:
            messages: each has a `role`, and a `content` that is text or a list of text parts
                (`{"type": "text", "text": ...}`); those of an assistant may have `tool_calls`,
                those of a tool a `tool_call_id`.
            tools: what the model may call, as in the OpenAI API. A template without a place for
                them gets them as a system message.
            template_options: further variables of the template, such as `enable_thinking`.

        Raises:
            RequestError: there is no template, or it does not take these messages.
        """
        if not self._template:
            raise RequestError(
                f"model {self._name!r} has no chat template; send a plain text prompt instead"
            )
        if not messages:
            raise RequestError("the chat has no messages; expected at least one")
        plain = [_plain_message(message, i) for i, message in enumerate(messages)]
        options = dict(template_options or {})
        if reserved := sorted(options.keys() & self._reserved):
            raise RequestError(f"chat_template_kwargs cannot set {reserved[0]!r}")
        if "tools" in self._template:
            options["tools"] = list(tools) or None
        else:
            plain = _without_tools(plain, tools)
        try:
            text: str = self._tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise RequestError(f"the chat template refused the messages: {error}") from error
        # The template has written the special tokens already.
        ids: list[int] = self._backend.encode(_utf8(text), add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids, special ones too if asked for. Raises RequestError for no id."""
        try:
            text: str = self._backend.decode(list(token_ids), skip_special_tokens=not special)
        except (OverflowError, TypeError) as error:
            raise RequestError(f"a token id cannot be decoded: {error}") from error
        return text

    def decode_token(self, token_id: int) -> str:
        """The text of one token, special ones too; part of a character is U+FFFD."""
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text


def _plain_message(message: Message, position: int) -> dict[str, Any]:
    where = f"message {position}"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} has no role; expected {{'role': ..., 'content': ...}}")
    plain: dict[str, Any] = {"role": message["role"]}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            plain[key] = str(message[key])
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call, where) for call in _list(calls, where)]
    content = message.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise RequestError(f"{where} has a part of type {kind!r}; only text is supported")
            parts.append(part["text"])
        content = "".join(parts)
    if content is None and "tool_calls" in plain:
        content = ""
    if not isinstance(content, str):
        raise RequestError(f"{where} has no text content; expected a string or text parts")
    return {**plain, "content": content}


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"{where} has tool_calls that are no list")
    return value


def _plain_call(call: object, where: str) -> dict[str, Any]:
    """A tool call as templates want it: its arguments as an object, not as text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} has a tool call without a function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"{where} has a tool call whose arguments are no JSON: {error}"
            ) from error
    assert isinstance(call, Mapping)
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _without_tools(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Tools and calls as plain messages, in the words of Hermes, for templates without them."""
    plain = []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls", ()):
            text = json.dumps(call["function"], ensure_ascii=False)
            content += f"\n{HERMES_START}\n{text}\n{HERMES_END}"
        if message["role"] == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            plain.append({"role": "user", "content": content})
        else:
            plain.append({"role": message["role"], "content": content.lstrip("\n")})
    if not tools:
        return plain
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        "You may call one or more functions to assist with the user query. Their signatures are "
        f"within <tools></tools>:\n<tools>\n{signatures}\n</tools>\n"
        "For each function call return a JSON object with its name and arguments within "
        f'{HERMES_START}{HERMES_END}:\n{HERMES_START}\n{{"name": <function-name>, '
        f'"arguments": <args-json-object>}}\n{HERMES_END}'
    )
    if plain[0]["role"] == "system":
        first = {"role": "system", "content": f"{plain[0]['content']}\n\n{text}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _utf8(text: str) -> str:
    """Refuse lone surrogates, which JSON and undecodable arguments may bring and no text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid Unicode: {error.reason}") from error
    return text
