"""A small byte-level tokenizer: any text goes through it and comes back."""

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 512
EOS_TOKEN_ID = 2
_SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>"]
_TEXT = """The cat sat on the mat, and the dog sat by the door. Once upon a time there was a model
that answered with JSON: {"name": "Ada", "age": 36, "tags": ["a", "b"], "ok": true, "no": null}.
Numbers are 1, 2, 3, 10 and 3.14; the rest of the text is here so that some words are one token.
"""
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def make_backend() -> Tokenizer:
    """The tokenizer of the tokenizers library; needs no torch."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


def make_tokenizer() -> Any:
    """The same as a transformers tokenizer, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=make_backend(),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )
