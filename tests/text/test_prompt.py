"""Conversations as clients send them, and what the chat template makes of them."""

from typing import Any

import pytest
import torch
from tiny_tokenizer import EOS_TOKEN_ID, make_tokenizer

from hotset.errors import RequestError
from hotset.model.loaded import LoadedModel
from hotset.text.prompt import PromptEncoder

# As Qwen's and Llama's do it: arguments through `tojson`. `items` fails where they are no object.
CALLS = (
    "{% if tools %}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls %}[{{ c.function.name }} {{ ARGS }}]{% endfor %}<eos>{% endfor %}"
)
TO_JSON = CALLS.replace("ARGS", "c.function.arguments | tojson")
ITEMS = CALLS.replace(
    "{{ ARGS }}", "{% for k, v in c.function.arguments | items %}{{k}}{% endfor %}"
)
USER = {"role": "user", "content": "hi"}


def encoder(template: str | None = None) -> PromptEncoder:
    tokenizer = make_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    model: Any = torch.nn.Module()
    return PromptEncoder(LoadedModel(model, tokenizer, "tiny", "tiny", (EOS_TOKEN_ID,), 512))


def written(messages: list[Any], template: str | None = None) -> str:
    one = encoder(template)
    return one.decode(one.encode_chat(messages), special=True).removesuffix("<assistant>")


def test_developer_is_system() -> None:
    system, developer = ({"role": r, "content": "be brief"} for r in ("system", "developer"))
    assert written([developer, USER]) == written([system, USER])
    assert written([USER, developer]) == written([USER, system])


def test_developer_and_system_at_the_start_are_one_message_in_their_order() -> None:
    system, developer = {"role": "system", "content": "a"}, {"role": "developer", "content": "b"}
    assert written([system, developer, USER]) == "<system>a\n\nb<eos><user>hi<eos>"
    assert written([developer, system, USER]) == "<system>b\n\na<eos><user>hi<eos>"
    assert written([system, system, USER]) == "<system>a<eos><system>a<eos><user>hi<eos>"


@pytest.mark.parametrize("role", ["narrator", "System", "", "ipython"])
def test_a_role_that_is_not_known_is_refused_with_those_that_are(role: str) -> None:
    with pytest.raises(RequestError, match=r"message 1 has the role .* expected system, develop"):
        written([USER, {"role": role, "content": "x"}])


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "I will not."}, "I will not."),
        ({"content": "", "refusal": "No."}, "No."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": "yes", "refusal": None}, "yes"),
    ],
)
def test_an_assistants_message_without_text_is_taken_back(message: Any, text: str) -> None:
    assert written([{"role": "assistant", **message}]) == f"<assistant>{text}<eos>"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user"}, "no text content"),
        ({"role": "user", "content": [{"type": "text"}]}, "'text' without its text"),
        ({"role": "user", "content": [{"type": ["a"]}]}, "part of type"),
        ({"role": "assistant", "content": 5}, "no text content"),
        ({"role": "assistant", "refusal": 5}, "refusal that is no string"),
        ({"role": "assistant", "tool_calls": [{}]}, "without a function name"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "no list"),
    ],
)
def test_a_message_that_cannot_be_read_is_refused_by_its_place(message: Any, says: str) -> None:
    with pytest.raises(RequestError, match=f"message 1 .*{says}"):
        written([USER, message])


@pytest.mark.parametrize("form", ["tool_calls", "function_call"])
def test_a_cut_call_is_taken_back_as_it_was_sent(form: str) -> None:
    function = {"name": "weather", "arguments": '{"cit'}
    call: Any = [{"id": "a", "type": "function", "function": function}]
    message = {"role": "assistant", "content": None, form: call}
    if form == "function_call":
        message[form] = function
    as_text = '<assistant><tool_call>\n{"name": "weather", "arguments": {"cit<eos>'
    assert written([message], TO_JSON) == '<assistant>[weather "{\\"cit"]<eos>'
    assert written([message], ITEMS) == written([message]) == as_text
    whole = {**function, "arguments": '{"city": "Rome"}'}
    message[form] = whole if form == "function_call" else [{**call[0], "function": whole}]
    assert written([message], ITEMS) == "<assistant>[weather city]<eos>"


def test_a_template_that_fails_is_told_in_our_words_and_one_that_refuses_in_its_own() -> None:
    with pytest.raises(RequestError, match="refused the messages: roles must alternate"):
        written([USER], "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="failed with TypeError") as failed:
        written([USER], "{{ messages[0].content + 1 }}")
    assert "concatenate" not in str(failed.value)


# As processors have it, of LLaVA and others: contents are lists of parts.
PARTS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}<eos>"
    "{% endfor %}"
)


@pytest.mark.parametrize("content", ["hi", [{"type": "text", "text": "hi"}]])
def test_a_template_that_reads_parts_alone_gets_every_text_as_a_part(content: Any) -> None:
    answer = {"role": "assistant", "content": "yes"}
    messages = [{"role": "user", "content": content}, answer, USER]
    assert written(messages, PARTS) == "<user>hi<eos><assistant>yes<eos><user>hi<eos>"


@pytest.mark.parametrize(
    ("kind", "what"), [("image_url", "an image"), ("input_audio", "audio"), ("video", "a video")]
)
def test_what_is_no_text_is_refused_by_name(kind: str, what: str) -> None:
    part = {"type": kind, kind: {"url": "data:,"}}
    with pytest.raises(RequestError, match=f"message 0 has {what} .*{kind}.* not supported"):
        written([{"role": "user", "content": [{"type": "text", "text": "see"}, part]}])
