"""From prompts and chats to token ids."""

import contextlib
import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from hotset.errors import RequestError
from hotset.foreign_text import ForeignTextError, parse_json
from hotset.model.loaded import LoadedModel
from hotset.text.repeats import ChatPrompt, find_repeats
from hotset.text.token_text import TokenBytes, TokenDecoder
from hotset.text.tool_calls import HERMES_END, HERMES_START, MARKERS

Message = Mapping[str, Any]

_SYSTEM_ROLES = ("system", "developer")  # newer clients of OpenAI send `developer`
ROLES = (*_SYSTEM_ROLES, "user", "assistant", "tool", "function")
_ROLES_TEXT = ", ".join(ROLES[:-1]) + " or " + ROLES[-1]
# Type of a part of a message's content -> the kind of content, where it is no text.
_MEDIA_PARTS = {
    **dict.fromkeys(("image", "image_url", "input_image"), "an image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "a video"),
    **dict.fromkeys(("file", "input_file", "document"), "a file"),
}
# Type of a part of a message's content -> where its text is.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class PromptEncoder:
    """Encodes text and chats for one model. May be used from any thread.

    Args:
        model: that it is for.
        finds_repeats: whether to say how much of a chat later ones repeat.

    Attributes:
        tokens: the bytes and name of each token.
        end_ids: of the tokens that end an answer.
        no_template: one line, where the model has no chat template and so takes no chats.

    Raises:
        ModelError: the model has no tokenizer.
    """

    def __init__(self, model: LoadedModel, *, finds_repeats: bool = False) -> None:
        self._tokenizer = model.require_tokenizer()
        # The tokenizer object sets these on each call, which other threads' calls would see.
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.tokens = TokenBytes(self._backend)
        self.end_ids = frozenset(model.eos_token_ids)
        self._finds_repeats = finds_repeats
        self._template = str(self._tokenizer.chat_template or "")
        self.no_template: str | None = None
        if not self._template:
            self.no_template = (
                f"model {model.name!r} has no chat template: it takes plain text prompts only, "
                "as /v1/completions does"
            )
        self._reserved = inspect.signature(self._tokenizer.apply_chat_template).parameters.keys()
        # Tool-call markers that are special tokens: the text of an output leaves them out.
        self.marker_ids = {
            token_id: token.content
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special and token.content in MARKERS
        }
        self._takes_parts = bool(self._template) and self._drops_plain_texts()
        # Whether calls begin with this tag, in the template's own words.
        self.has_functions = "<function=" in self._template

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
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> ChatPrompt:
        """Encode a conversation with the model's chat template, up to where it would answer.

        Args:
            messages: each has a `role` of `ROLES`, and a `content` that is text or a list of
                text parts (`{"type": "text", "text": ...}`). A message of an assistant may have
                `tool_calls`, or a `refusal` in place of the content; a message of a tool has a
                `tool_call_id`. `developer` is `system`.
            tools: what the model may call, as in the OpenAI API. A template without a place for
                them gets them as a system message.
            template_options: further variables of the template, such as `enable_thinking`.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: end within the last message, so that the answer goes on with
                it. Not together with `add_generation_prompt`.

        Raises:
            RequestError: there is no template, or it does not take these messages.
        """
        if self.no_template is not None:
            raise RequestError(self.no_template, param="messages", code="no_chat_template")
        if not messages:
            raise RequestError("the chat has no messages; expected at least one", param="messages")
        plain = _join_developer([_plain_message(one, i) for i, one in enumerate(messages)])
        options = self._checked(template_options or {})
        options["add_generation_prompt"] = add_generation_prompt
        if continue_final_message:
            _check_can_continue(plain[-1])
            options["continue_final_message"] = True
        if "tools" in self._template:
            options["tools"] = list(tools) or None
        else:
            plain = _without_tools(_cut_calls_as_text(plain), tools)
        try:
            text = self._render(plain, options)
        except RequestError:
            # It may read the arguments of calls as objects, which cut ones are not.
            written = _cut_calls_as_text(plain)
            if written == plain:
                raise
            plain = written
            text = self._render(plain, options)
        # The template has written the special tokens already.
        encoding = self._backend.encode(_utf8(text), add_special_tokens=False)
        prompt = ChatPrompt(encoding.ids)
        if self._finds_repeats and add_generation_prompt:
            options["add_generation_prompt"] = False
            prompt.repeated = find_repeats(
                plain, text, encoding, lambda messages: self._render(messages, options)
            )
        return prompt

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a request's variables of the template; none may be one that is set here."""
        if reserved := sorted(options.keys() & self._reserved):
            raise RequestError(
                f"chat_template_kwargs cannot set {reserved[0]!r}", param="chat_template_kwargs"
            )
        return dict(options)

    def _drops_plain_texts(self) -> bool:
        """Whether the template takes texts only as parts of a list, as many processors' do."""
        text = "a text"

        def writes(content: object) -> bool:
            try:
                return text in self._write([{"role": "user", "content": content}], {})
            except RequestError:
                return False

        return not writes(text) and writes([_as_part(text)])

    def _render(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        if self._takes_parts:
            messages = [{**one, "content": [_as_part(one["content"])]} for one in messages]
        return self._write(messages, options)

    def _write(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template is a program: it may raise any error
            if type(error) is TemplateError:  # in its own words, as of the order of roles
                raise RequestError(
                    f"the chat template refused the messages: {error}", param="messages"
                ) from error
            raise RequestError(
                "the chat template cannot write these messages; it failed with "
                f"{type(error).__name__}: see the model's chat_template for what it expects",
                param="messages",
            ) from error
        return text

    def decode_with_offsets(
        self, token_ids: Sequence[int], special: bool = False
    ) -> tuple[str, list[int]]:
        """The text of token ids, and where in it each begins; see `TokenDecoder.feed_at`."""
        decoder = TokenDecoder(self._backend, [], skip_special=not special)
        pieces, offsets = [], []
        for token_id in token_ids:
            piece, offset = decoder.feed_at(token_id)
            pieces.append(piece)
            offsets.append(offset)
        return "".join(pieces) + decoder.flush(), offsets

    def decode(self, token_ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids, with special tokens if asked for; RequestError for no id."""
        try:
            text: str = self._backend.decode(list(token_ids), skip_special_tokens=not special)
        except (OverflowError, TypeError) as error:
            raise RequestError(
                "a token id cannot be decoded; expected whole numbers from 0 to 4294967295",
                param="tokens",
            ) from error
        return text


def _plain_message(message: Message, position: int) -> dict[str, Any]:
    where = f"message {position}"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise _refused(where, "has no role; expected {'role': ..., 'content': ...}")
    role = message["role"]
    if role not in ROLES:
        raise _refused(where, f"has the role {role!r}; expected {_ROLES_TEXT}")
    plain: dict[str, Any] = {"role": role}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            plain[key] = str(message[key])
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call, where) for call in _list(calls, where)]
    elif call := message.get("function_call"):  # what came before `tool_calls`
        plain["tool_calls"] = [_plain_call({"function": call}, where)]
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part_text(part, where) for part in content)
    if role == "assistant":  # its answer may be a refusal, calls alone, or nothing at all
        refusal = message.get("refusal")
        if not isinstance(refusal, str | None):
            raise _refused(where, "has a refusal that is no string")
        content = content or refusal or ("" if content is None else content)
    if not isinstance(content, str):
        raise _refused(where, "has no text content; expected a string or text parts")
    return {**plain, "content": content}


def _part_text(part: object, where: str) -> str:
    """The text of one part of a message's content."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or not isinstance(kind, str) or kind not in _TEXT_PARTS:
        holds = _MEDIA_PARTS.get(kind) if isinstance(kind, str) else None
        if holds is not None:
            raise _refused(
                where,
                f"has {holds} (a part of type {kind!r}), which is not supported: hotset answers "
                "text alone, multimodal models too; leave it out",
            )
        raise _refused(where, f"has a part of type {kind!r}; only text is supported")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise _refused(where, f"has a part of type {kind!r} without its text; expected a string")
    return text


def _as_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _check_can_continue(last: Message) -> None:
    if not last["content"].strip() or last.get("tool_calls"):
        raise RequestError(
            "continue_final_message is true and the last message has no text to go on from",
            param="continue_final_message",
        )


def _join_developer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with `developer` as `system`, which is what templates know.

    Many templates have a place for one system message only, the first. So the first ones are
    joined if some were the developer's; several that are all `system` stay as they were sent.
    """
    head = list(itertools.takewhile(lambda one: one["role"] in _SYSTEM_ROLES, messages))
    if len(head) > 1 and any(one["role"] == "developer" for one in head):
        joined = {"role": "system", "content": "\n\n".join(one["content"] for one in head)}
        messages = [joined, *messages[len(head) :]]
    return [{**one, "role": "system"} if one["role"] == "developer" else one for one in messages]


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _refused(where, "has tool_calls that are no list")
    return value


def _plain_call(call: object, where: str) -> dict[str, Any]:
    """A tool call as templates want it: its arguments as an object, not as text.

    Arguments that are no JSON stay text: a call that `max_tokens` cut is a part of the answer.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _refused(where, "has a tool call without a function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ForeignTextError):
            arguments = parse_json(arguments or "{}")
    assert isinstance(call, Mapping)
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _cut_calls_as_text(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each call whose arguments are text written as a model writes its calls."""
    written = []
    for message in messages:
        calls, content = [], message["content"]
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if isinstance(function["arguments"], str):
                name = json.dumps(function["name"], ensure_ascii=False)
                text = f'{{"name": {name}, "arguments": {function["arguments"]}'
                content = f"{content}\n{HERMES_START}\n{text}".lstrip("\n")
            else:
                calls.append(call)
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        written.append({**rest, "content": content, **({"tool_calls": calls} if calls else {})})
    return written


def _refused(where: str, what: str) -> RequestError:
    return RequestError(f"{where} {what}", param=where.replace("message ", "messages."))


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
        raise RequestError(
            "the prompt is not valid Unicode: it has half a surrogate pair", param="prompt"
        ) from error
    return text
