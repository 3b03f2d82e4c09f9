"""What later prompts repeat of a chat: never more than they do, and hardly less."""

from itertools import takewhile
from typing import Any

import pytest
import torch
from tiny_tokenizer import CHAT_TEMPLATE, EOS_TOKEN_ID, make_tokenizer

from hotset.model.loaded import LoadedModel
from hotset.text.prompt import PromptEncoder

# As templates of reasoning models: no reasoning of an assistant before the last question.
REASONING = (
    "{% if tools %}{{ tools }}{% endif %}"
    "{% set last = namespace(user=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.index0 > last.user and m.reasoning_content %}"
    "(thinking: {{ m.reasoning_content }})"
    "{% endif %}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>(thinking: {% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if loop.index0 > 2 %}{{ raise_exception('too long') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
)
SYSTEM = {"role": "system", "content": "You answer in few words, and always in English."}


def encoder(template: str, *, finds_repeats: bool = True) -> PromptEncoder:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    model: Any = torch.nn.Module()
    loaded = LoadedModel(model, tokenizer, "tiny", "tiny", (EOS_TOKEN_ID,), 512)
    return PromptEncoder(loaded, finds_repeats=finds_repeats)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str, reasoning: str = "hm") -> dict[str, str]:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


def common(one: list[int], other: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


CHATS = [
    [SYSTEM, user("where is the cat?")],
    [user("where is the cat?")],
    [SYSTEM, user("where is it?"), answer("on the mat"), user("and the dog?")],
    [user("où est le chat?"), answer("là 😀"), user("merci  "), answer("", "long"), user("\n")],
]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, REASONING])
@pytest.mark.parametrize("chat", CHATS)
def test_the_next_turn_repeats_what_is_said_whatever_the_answer(
    chat: list[dict[str, str]], template: str
) -> None:
    one = encoder(template)
    prompt = one.encode_chat(chat)
    repeated = prompt.repeated[-1]
    for text in ("the dog sat by the door", "(hm)", "-", ""):
        longer = [*chat, answer(text), user("Numbers are 1, 2, 3")]
        shared = common(prompt, one.encode_chat(longer))
        assert repeated <= shared <= len(prompt)
        assert len(text) < 5 or shared - repeated <= 2


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, REASONING])
def test_other_chats_repeat_the_system_message(template: str) -> None:
    one = encoder(template)
    prompt = one.encode_chat([SYSTEM, user("where is the cat?"), answer("here"), user("so?")])
    for text in ("Once upon a time", "- and +", "hi"):
        shared = common(prompt, one.encode_chat([SYSTEM, user(text)]))
        assert prompt.repeated[0] <= shared and shared - prompt.repeated[0] <= 2


def test_reasoning_that_the_next_question_drops_is_not_repeated() -> None:
    one = encoder(REASONING)
    chat = [SYSTEM, user("where is it?"), answer("I look", "a cat, that is")]
    again = [*chat, {"role": "tool", "content": "the cat sat on the mat, and the dog by the door"}]
    prompt = one.encode_chat(again)
    longer = one.encode_chat([*again, answer("there"), user("thanks")])
    assert prompt.repeated[-1] <= common(prompt, longer) < len(prompt) - 30


def test_a_template_that_refuses_a_longer_chat_says_nothing_of_it() -> None:
    chat = [SYSTEM, user("where is the cat?")]
    prompt = encoder(STRICT).encode_chat(chat)
    assert len(prompt.repeated) == 1
    assert list(prompt) == encoder(STRICT, finds_repeats=False).encode_chat(chat)


def test_nothing_is_looked_for_unless_it_is_of_use() -> None:
    chat = [SYSTEM, user("hi")]
    assert not encoder(CHAT_TEMPLATE, finds_repeats=False).encode_chat(chat).repeated
    one = encoder(CHAT_TEMPLATE)
    whole = one.encode_chat([*chat, answer("a part")], add_generation_prompt=False)
    assert not whole.repeated
