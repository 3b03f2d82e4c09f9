import json
from typing import Any

import pytest
import torch
from sampling import sample
from tiny_tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, make_tokenizer

from hotset.executor.sampler import Sampler
from hotset.request import SamplingParams
from hotset.sequence import Request

TOKENIZER = make_tokenizer()
TAGS = {"type": "array", "uniqueItems": True, "items": {"type": "string"}}


def written(schema: dict[str, Any], text: str, *, most: int = 80) -> tuple[str, str | None]:
    """What a model that would write `text` writes under a schema, and the error it ends with."""
    sampler = Sampler(VOCAB_SIZE, "cpu", tokenizer=TOKENIZER, eos_token_ids=(EOS_TOKEN_ID,))
    request = Request("r", 1, [5], SamplingParams(json_schema=schema), 10_000)
    wanted = [*TOKENIZER.encode(text), EOS_TOKEN_ID]
    generator = torch.Generator().manual_seed(0)
    while request.token_ids[-1] != EOS_TOKEN_ID and request.num_output_tokens < most:
        logits = torch.randn(1, VOCAB_SIZE, generator=generator)
        if request.num_output_tokens < len(wanted):
            logits[0, wanted[request.num_output_tokens]] = 99.0
        logits[0, TOKENIZER.encode('"')] = logits[0, TOKENIZER.encode("]")] = 9.0
        sampled = sample(sampler, logits, [request])
        if sampled.errors:
            return TOKENIZER.decode(request.output_ids), sampled.errors[request.sequence_id]
        request.token_ids += sampled.token_ids
    return TOKENIZER.decode(request.output_ids, skip_special_tokens=True), None


def test_an_item_that_is_there_already_goes_on_to_be_another() -> None:
    text, error = written(TAGS, '["cat","dog","cat"]')
    items = json.loads(text)
    assert error is None
    assert items[:2] == ["cat", "dog"]
    assert items[2] != "cat" and len(set(items)) == len(items)

    text, _ = written({**TAGS, "items": {"type": "integer"}}, "[1,12,1,12]")
    assert json.loads(text)[:2] == [1, 12]
    assert len(set(json.loads(text))) == len(json.loads(text))


def test_a_name_is_there_once_where_properties_are_counted() -> None:
    schema = {"type": "object", "minProperties": 2, "additionalProperties": {"type": "null"}}
    text, error = written(schema, '{"cat":null,"cat":null}')
    assert error is None
    assert len(json.loads(text)) >= 2

    schema = {**schema, "propertyNames": {"pattern": "^[ab]$"}, "minProperties": 3}
    _, error = written(schema, '{"a":null,"b":null,"a":null}')
    assert error is not None and "two names at # are" in error


def test_other_arrays_may_have_equal_items() -> None:
    schema = {
        "type": "object",
        "properties": {"tags": {"$ref": "#/$defs/tags"}, "all": {"type": "array"}},
        "required": ["tags", "all"],
        "additionalProperties": False,
        "$defs": {"tags": TAGS},
    }
    text = '{"tags":["a","b"],"all":["a","a",1,1]}'
    assert written(schema, text) == (text, None)
    text, error = written(schema, '{"tags":["a","a"],"all":["a","a"]}', most=200)
    assert error is None
    assert json.loads(text)["tags"] != ["a", "a"]


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ({"type": "number"}, "[1,2,1.0]"),
        ({"anyOf": [{"const": "a"}, {"const": "b"}, {"const": 1}]}, '["a","b","a"]'),
    ],
)
def test_where_nothing_else_was_left_the_output_is_an_error(items: Any, text: str) -> None:
    written_text, error = written({**TAGS, "items": items}, text)
    assert error is not None and "uniqueItems wants each once" in error
    assert error.startswith("json_schema cannot be followed: two items at # are ")
    assert written_text in text
