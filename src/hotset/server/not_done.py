"""Fields of OpenAI's and vLLM's APIs that are known, not done, and harmless at some values."""

from typing import Any

from hotset.errors import RequestError
from hotset.server.validation import shown

# Name -> the values with which a field asks for nothing; any other would change the answer.
Known = dict[str, tuple[Any, ...]]

_BOTH: Known = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "early_stopping": (False,),
    "guided_decoding_backend": ("auto",),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "priority": (0,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
OF_CHATS: Known = {
    **_BOTH,
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_content_format": ("auto",),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "return_token_ids": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
OF_TEXTS: Known = {
    **_BOTH,
    "add_special_tokens": (True,),
    "suffix": ("",),
}


def without_not_done(data: dict[str, Any], known: Known, *, within: str = "") -> dict[str, Any]:
    """`data` without the fields of `known`; each of these fields has to ask for nothing.

    Args:
        data: a JSON object of a request.
        known: fields that it may have.
        within: what precedes their names in a message.

    Raises:
        RequestError: one does not; says which, its value and what is taken.
    """
    for name in data.keys() & known.keys():
        value, harmless = data[name], known[name]
        if value is None or any(_is_same(value, one) for one in harmless):
            continue
        expected = " or ".join([*map(shown, harmless), "no such field"])
        raise RequestError(
            f"{within}{name} is {shown(value)}, which is not supported; expected {expected}",
            param=f"{within}{name}",
            code="unsupported_parameter",
        )
    return {name: value for name, value in data.items() if name not in known}


def _is_same(value: object, other: object) -> bool:
    """Whether two values are the same JSON; 1 and 1.0 are, 1 and true are not."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
