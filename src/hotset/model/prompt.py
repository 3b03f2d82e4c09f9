"""From prompts and chats to token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from hotset.errors import RequestError
from hotset.model.loader import LoadedModel

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

    def encode_text(self, text: str) -> list[int]:
        """Encode a text as it is, with the tokens that the model wants at a text's start."""
        ids: list[int] = self._backend.encode(_utf8(text)).ids
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation with the model's chat template, up to where it would answer.

        Args:
            messages: each has a `role`, and a `content` that is text or a list of text parts
                (`{"type": "text", "text": ...}`).

        Raises:
            RequestError: there is no template, or it does not take these messages.
        """
        if not self._tokenizer.chat_template:
            raise RequestError(
                f"model {self._name!r} has no chat template; send a plain text prompt instead"
            )
        if not messages:
            raise RequestError("the chat has no messages; expected at least one")
        plain = [_plain_message(message, i) for i, message in enumerate(messages)]
        try:
            text: str = self._tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refused the messages: {error}") from error
        # The template has written the special tokens already.
        ids: list[int] = self._backend.encode(_utf8(text), add_special_tokens=False).ids
        return ids

    def decode_token(self, token_id: int) -> str:
        """The text of one token, special ones too; part of a character is U+FFFD."""
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text


def _plain_message(message: Message, position: int) -> dict[str, str]:
    where = f"message {position}"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} has no role; expected {{'role': ..., 'content': ...}}")
    content = message.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise RequestError(f"{where} has a part of type {kind!r}; only text is supported")
            parts.append(part["text"])
        content = "".join(parts)
    if not isinstance(content, str):
        raise RequestError(f"{where} has no text content; expected a string or text parts")
    return {"role": message["role"], "content": content}


def _utf8(text: str) -> str:
    """Refuse lone surrogates, which JSON and undecodable arguments may bring and no text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid Unicode: {error.reason}") from error
    return text
