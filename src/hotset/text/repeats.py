"""How much of a chat's prompt later prompts repeat, told by the chat template itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Encoding

from hotset.errors import RequestError

Messages = Sequence[Mapping[str, Any]]
_NUM_SOUGHT = 16  # characters before one that no token has


class ChatPrompt(list[int]):
    """The token ids of a chat.

    Attributes:
        repeated: how many of the first tokens later prompts are likely to repeat, in order.
    """

    repeated: Sequence[int] = ()


def find_repeats(
    messages: Messages, text: str, encoding: Encoding, write: Callable[[Messages], str]
) -> list[int]:
    """How many of the first tokens of a prompt other chats and this one's next turn repeat.

    What another chat repeats ends where the first message differs that is not the system's; what
    the next turn repeats, where an answer and a question follow. Templates that leave the reasoning
    out of earlier turns, or add to what begins an answer, do so there too.

    Args:
        messages: of the chat.
        text: `messages` as the template writes them, with what begins an answer.
        encoding: of the text.
        write: messages by the template, without what begins an answer; may raise RequestError.
    """
    found = set()
    for others in (_other_chat(messages), _next_turn(messages)):
        try:
            length = _common_length(text, write(others)) if others else 0
        except RequestError:
            continue  # the template has no such chats
        found.add(_num_tokens(encoding, length))
    return sorted(found - {0})


def _other_chat(messages: Messages) -> Messages:
    """The chat with another first message after the system's messages."""
    first = next((i for i, one in enumerate(messages) if one["role"] != "system"), None)
    if first is None:
        return ()
    content = "+" if str(messages[first]["content"]).startswith("-") else "-"
    return [*messages[:first], {"role": messages[first]["role"], "content": content}]


def _next_turn(messages: Messages) -> Messages:
    """The chat after an answer and another question."""
    if messages[-1]["role"] == "assistant":
        return ()
    answer, question = ({"role": role, "content": "-"} for role in ("assistant", "user"))
    return [*messages, answer, question]


def _common_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _num_tokens(encoding: Encoding, length: int) -> int:
    """Tokens before the one with the last of `length` characters, which another may stand for."""
    return next(filter(None, _tokens_before(encoding, length)), 0)


def _tokens_before(encoding: Encoding, length: int) -> Iterator[int | None]:
    for place in range(length - 1, max(-1, length - 1 - _NUM_SOUGHT), -1):
        yield encoding.char_to_token(place)
