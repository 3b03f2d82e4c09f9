import json
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from sampling import sample
from tiny_tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, make_tokenizer

from hotset.errors import ConfigError
from hotset.executor.sampler import Sampler
from hotset.grammar.json_bounds import JsonBounds
from hotset.option_groups import FormOptions
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.sequence import Request

TOKENIZER = make_tokenizer()
TEXTS = [TOKENIZER.decode([i]) for i in range(VOCAB_SIZE)]
BOUNDS = JsonBounds(digits=5, string=10, items=3, depth=2)


def outputs(
    bounds: JsonBounds, schema: dict[str, Any], liked: str, *, most: int = 400, num: int = 6
) -> list[str]:
    """Finished texts of a model that would rather go on with a token of `liked` for ever."""
    sampler = Sampler(
        VOCAB_SIZE, "cpu", tokenizer=TOKENIZER, eos_token_ids=(EOS_TOKEN_ID,), bounds=bounds
    )
    bonus = torch.tensor([12.0 * bool(re.fullmatch(liked, text)) for text in TEXTS])
    texts = []
    for seed in range(num):
        params = SamplingParams(json_schema=schema, temperature=1.0, seed=seed)
        request = Request("r", 1, [5], params, 10_000)
        generator = torch.Generator().manual_seed(seed)
        while request.token_ids[-1] != EOS_TOKEN_ID:
            assert request.num_output_tokens < most, TOKENIZER.decode(request.output_ids)
            logits = torch.randn(1, VOCAB_SIZE, generator=generator) + bonus
            sampled = sample(sampler, logits, [request])
            assert not sampled.errors
            request.token_ids += sampled.token_ids
        sampler.release("r")
        texts.append(TOKENIZER.decode(request.output_ids, skip_special_tokens=True))
    return texts


def runs_of_digits(texts: Iterable[str]) -> int:
    return max(len(run) for text in texts for run in re.findall(r"\d+", text))


@pytest.mark.parametrize("schema", [{"type": "integer"}, {"type": "number"}])
def test_a_model_that_likes_digits_ends_its_numbers(schema: dict[str, Any]) -> None:
    texts = outputs(BOUNDS, schema, r"[0-9.eE+-]+")

    assert runs_of_digits(texts) == 5
    for text in texts:
        json.loads(text)
        assert not (exponent := re.search(r"[eE][+-]?(\d+)", text)) or len(exponent[1]) <= 2


def test_without_bounds_it_does_not() -> None:
    with pytest.raises(AssertionError, match=r"\d{300}"):
        outputs(JsonBounds(), {"type": "integer"}, r"[0-9]+")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "minimum": 1e17},
        {"type": "integer", "minimum": 10**17},
        {"type": "integer", "multipleOf": 7},
        {"type": "number", "multipleOf": 0.001},
        {"const": 123456789},
        {"enum": [1234567890123, 2.0000000001, "12345678901234567890"]},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1e-9},
        {"type": "string", "minLength": 30, "maxLength": 40},
        {"type": "string", "pattern": "^[ab]{25}$"},
        {"type": "array", "minItems": 5, "items": {"type": "null"}},
        {"type": "array", "prefixItems": [{"type": "boolean"}] * 6, "minItems": 6, "items": False},
        {"const": {"a": {"b": {"c": [[1, 2, 3, 4, 5, 6]]}}}},
        {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1,
         "items": {"type": "array", "minItems": 1, "items": {"const": "deep, [1]"}}}},
    ],
)  # fmt: skip
def test_a_schema_that_needs_more_than_a_bound_is_fulfilled(schema: dict[str, Any]) -> None:
    for text in outputs(BOUNDS, schema, r"[0-9a-z]+", num=3):
        value = json.loads(text)
        if "const" in schema:
            assert value == schema["const"]
        if "minLength" in schema:
            assert 30 <= len(value) <= 40
        if "minItems" in schema:
            assert len(value) >= schema["minItems"]
        if "multipleOf" in schema:
            assert round(value / schema["multipleOf"], 6).is_integer()


def test_strings_arrays_and_nesting_end_at_their_bounds() -> None:
    longest_token = max(map(len, TEXTS))
    for text in outputs(BOUNDS, {"type": "string"}, r"[a-z ]+"):
        assert 10 <= len(json.loads(text)) <= 10 + longest_token
    for text in outputs(BOUNDS, {"type": "array", "items": {"enum": [1, "a", ","]}}, '[1a",]+'):
        assert 1 <= len(json.loads(text)) <= 3
    nested = {"type": "array", "items": {"$ref": "#"}}
    assert {depth_of(json.loads(text)) for text in outputs(BOUNDS, nested, r"\[+")} == {2}
    for text in outputs(BOUNDS, {"type": "object"}, r'[\[{"a:]+'):
        assert depth_of(json.loads(text)) <= 2


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def test_digits_in_strings_and_lengths_that_a_schema_names_are_free() -> None:
    schema = {"type": "string", "maxLength": 30}
    assert runs_of_digits(outputs(BOUNDS, schema, r"[0-9]+")) == 30


def test_an_engine_bounds_digits_unless_it_is_told_not_to() -> None:
    assert JsonBounds.of(FormOptions()) == JsonBounds(digits=20)
    assert JsonBounds.of(FormOptions(json_max_digits=0, json_max_items=9)) == JsonBounds(items=9)
    with pytest.raises(ConfigError, match="json_max_string is 0; expected 1 or more"):
        Options.of(json_max_string=0)
