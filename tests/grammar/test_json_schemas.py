"""Schemas by the dozen: what a grammar lets through is checked by a validator of its own."""

import datetime
import enum
import json
import pathlib
import re
import uuid
from typing import Annotated, Any, Literal

import jsonschema
import pydantic
import pytest
import torch
from sampling import sample
from tiny_tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, make_tokenizer

from hotset.errors import RequestError
from hotset.executor.sampler import Sampler
from hotset.grammar.json_bounds import JsonBounds
from hotset.grammar.json_schema import prepare
from hotset.grammar.rewrite import _PATTERNS
from hotset.request import SamplingParams
from hotset.sequence import Request

Json = dict[str, Any]

TOKENIZER = make_tokenizer()
BOUNDS = JsonBounds(digits=4, string=8, items=4, depth=4)
A, B = {"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(
        VOCAB_SIZE, "cpu", tokenizer=TOKENIZER, eos_token_ids=(EOS_TOKEN_ID,), bounds=BOUNDS
    )


def values(sampler: Sampler, schema: Json, num: int = 5) -> list[Any]:
    """What random tokens make of a schema, under several seeds."""
    found = []
    for seed in range(num):
        params = SamplingParams(json_schema=schema, temperature=1.0, seed=seed)
        request = Request("r", 1, [5], params, 10_000)
        generator = torch.Generator().manual_seed(seed)
        while request.token_ids[-1] != EOS_TOKEN_ID:
            assert request.num_output_tokens < 600
            logits = torch.randn(1, VOCAB_SIZE, generator=generator) * 2
            sampled = sample(sampler, logits, [request])
            assert not sampled.errors
            request.token_ids += sampled.token_ids
        sampler.release("r")
        found.append(json.loads(TOKENIZER.decode(request.output_ids, skip_special_tokens=True)))
    return found


def with_kind(kind: str, **properties: Any) -> Json:
    return {
        "type": "object",
        "properties": {"kind": {"const": kind}, **properties},
        "required": ["kind", *properties],
        "additionalProperties": False,
    }


CAT, DOG = with_kind("cat", lives={"type": "integer"}), with_kind("dog", name={"type": "string"})
CLOSED = {"additionalProperties": False}


@pytest.mark.parametrize(
    "schema",
    [
        # oneOf
        {"oneOf": [{"type": "string"}, {"type": "null"}]},
        {"oneOf": [{"const": 1, "title": "one"}, {"const": 2, "title": "two"}]},
        {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
            "discriminator": {"propertyName": "kind"},
            "$defs": {"cat": CAT, "dog": DOG},
        },
        {"oneOf": [A, B], "properties": {"a": {}, "b": {}}, **CLOSED},
        {"oneOf": [A, B, {"type": "array", "items": {"type": "null"}}]},
        {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 5}]},
        {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "string", "minLength": 3}]},
        {"oneOf": [{"enum": ["a", 1]}, {"enum": ["b", True]}], "anyOf": [{"type": "string"}]},
        {"type": "array", "items": {"oneOf": [CAT, DOG]}, "minItems": 1, "maxItems": 2},
        {"oneOf": [False, {"type": "boolean"}]},
        {
            "oneOf": [
                {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"], **CLOSED},
                {"type": "null"},
            ]
        },
        {
            "properties": {"x": {"oneOf": [{"$ref": "#/$defs/a"}, {"const": {"a": 1}}]}},
            "required": ["x"],
            "type": "object",
            "$defs": {"a": {"type": "object", "maxProperties": 0}},
        },
        # not, if
        {"type": ["string", "integer"], "not": {"type": "string"}},
        {"type": "string", "not": {"enum": ["", "a", "ab", "no"]}},
        {"type": "string", "maxLength": 2, "not": {"const": "a"}},
        {"type": "integer", "minimum": 0, "maximum": 4, "not": {"enum": [1, 2.0, 4]}},
        {"type": "boolean", "not": {"const": True}},
        {"not": {"type": ["object", "array", "number"]}},
        {"properties": {"a": {}, "b": {}}, "type": "object", **CLOSED, "not": A},
        {"not": {"anyOf": [{"type": "object"}, {"type": "array"}, {"minLength": 2}]}},
        {"type": "string", "not": {"not": {"enum": ["x", "y"]}}},
        {
            "type": "object",
            "properties": {"kind": {"enum": ["a", "b", "c"]}, "more": {"type": "null"}},
            "required": ["kind"],
            **CLOSED,
            "if": {"properties": {"kind": {"const": "a"}}},
            "then": {"required": ["more"]},
            "else": {"properties": {"more": False}},
        },
        {
            "type": "object",
            "properties": {"n": {"type": "number"}, "s": {"type": "string", "maxLength": 3}},
            "required": ["n"],
            "if": {"properties": {"n": {"minimum": 10}}, "required": ["n"]},
            "then": {"required": ["s"]},
            **CLOSED,
        },
        # What one property says of others
        {
            "type": "object",
            "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
            **CLOSED,
            "dependentRequired": {"a": ["b"]},
        },
        {
            "type": "object",
            "properties": {"a": {"type": "null"}, "b": {"enum": [1, 2]}},
            **CLOSED,
            "dependentSchemas": {"a": {"properties": {"b": {"const": 2}}, "required": ["b"]}},
        },
        {"type": "object", "properties": {"a": {}, "b": {}}, **CLOSED, "minProperties": 1},
        {"type": "object", "propertyNames": {"pattern": "^a+$"}, "maxProperties": 2},
        {"type": "object", "propertyNames": {"maxLength": 3}, "minProperties": 1},
        {"type": "object", "propertyNames": {"pattern": "^[ab]+$"}, "minProperties": 3},
        {"type": "object", "not": {"maxProperties": 2}},
        {
            "type": "object",
            "propertyNames": {"$ref": "#/$defs/name"},
            "additionalProperties": {"type": "boolean"},
            "minProperties": 1,
            "$defs": {"name": {"enum": ["red", "green"]}},
        },
        {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
        {"type": "array", "prefixItems": [{"type": "null"}], "unevaluatedItems": False},
        # Arrays
        {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b", "c"]}},
        {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2, 3]}, "minItems": 3},
        {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}, "minItems": 1},
        {"type": "array", "uniqueItems": True, "maxItems": 1},
        {"type": "array", "uniqueItems": True, "items": {"type": "string"}, "minItems": 3},
        {"type": "array", "uniqueItems": True, "items": {"type": "integer"}, "minItems": 4},
        {"type": "array", "uniqueItems": True, "minItems": 2},
        {"type": "array", "uniqueItems": False, "items": {"type": "null"}},
        {"type": "array", "contains": True, "maxItems": 2},
        {"type": "array", "contains": {"const": "a"}, "items": {"enum": ["a", "b"]}},
        {"type": "array", "contains": {"type": "null"}, "minContains": 2, "maxItems": 3},
        {"type": "array", "contains": {"const": 1}, "prefixItems": [{"type": "null"}]},
        {"type": "array", "contains": {"const": 1}, "minContains": 0, "items": {"type": "null"}},
        # Texts
        {"type": "string", "format": "binary"},
        {"type": "string", "format": "path", "maxLength": 5},
        {"type": "integer", "format": "int32"},
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
        {
            "type": "string",
            "pattern": r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,3}|(?=[\d.]{1,6}0*$)\d{0,3}\.\d{0,2}0*$)",
        },
        # Numbers
        {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308},
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        # As before
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", **CLOSED,
         "properties": {"a": {"$ref": "#/definitions/x~1y"}}, "definitions": {"x/y": A}},
        {"x-guidance": 7, "deprecated": True, "nullable": True, "type": "boolean"},
    ],
)  # fmt: skip
def test_what_a_schema_lets_through_is_valid(sampler: Sampler, schema: Json) -> None:
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    for value in values(sampler, schema):
        validator(schema).validate(value)


@pytest.mark.parametrize(
    ("schema", "line"),
    [
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]},
         "'oneOf' at # has branches 0 and 1 that may both fit one value: tell them apart"),
        ({"properties": {"x": {"oneOf": [{"minimum": 1}, {"type": "null"}, {"maxLength": 2}]}}},
         "'oneOf' at #/properties/x has branches 0 and 1"),
        ({"oneOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^b"}]},
         "'oneOf' at # has branches 0 and 1"),
        ({"not": {"pattern": "^a"}}, "'not' at # has 'pattern' in it, which is not supported"),
        ({"not": {"type": "integer"}}, "'not' at # has 'integer' in it"),
        ({"items": {"not": {"oneOf": [{"type": "null"}]}}}, "'not' at #/items has 'oneOf' in it"),
        ({"if": {"items": {}}, "then": {"type": "null"}}, "'if' at # has 'items' in it"),
        ({"type": "array", "uniqueItems": True, "items": {"enum": list("abcdefg")}},
         "'uniqueItems' at # has 7 constants to choose from; expected at most 6"),
        ({"allOf": [{"contains": {"type": "null"}, "maxContains": 2}]},
         "'maxContains' at #/allOf/0 is not supported"),
        ({"contains": {}, "minContains": 99}, "'minContains' at # is 99; expected at most 16"),
        ({"$ref": "#/$defs/a", "unevaluatedProperties": False, "$defs": {"a": A}},
         "'unevaluatedProperties' at # is not supported"),
        ({"$dynamicRef": "#x"}, "'\\$dynamicRef' at # is not supported"),
        ({"type": "string", "pattern": "^(?=a)b"}, "'pattern' at # looks ahead or behind"),
        ({"propertyNames": {"enum": ["abc"], "minLength": 3}}, "'propertyNames' at #"),
        ({"propertyNames": {"pattern": "a"}, "properties": {"b": {}}}, "'propertyNames' at #"),
        ({"propertyNames": {"type": "integer"}}, "'propertyNames' at # has a type"),
        ({"type": "number", "minimum": 1e25}, "'minimum' at # is 1e\\+25; expected a number"),
        ({"const": 2**53 + 1}, "'const' at # has 9007199254740993, which cannot be kept exactly"),
        ({"const": -(2**63)}, "'const' at # has -9223372036854775808, which cannot be kept"),
        ({"type": "integer", "enum": [1, 10**25]}, "'enum' at # has 10000000000000000000000000"),
        ({"properties": {"a": {"const": {"b": [1e300]}}}}, "'const' at #/properties/a has 1e"),
        ({"const": 123456789.12345679}, "'const' at # has 123456789.12345679, .* 15 digits"),
        ({"type": "strin"}, "'type' at # is 'strin'; expected one of array, boolean"),
        ({"type": [["string"]]}, "'type' at # is \\['string'\\]; expected one of array"),
        ({"required": True}, "'required' at # is of type boolean; expected array"),
        ({"minLength": -1}, "'minLength' at # is of type integer; expected whole number, 0 or"),
        ({"x-guidance": {"lenient": True}, "maxContains": 1, "contains": {}}, "'maxContains' at #"),
        ({"items": {"$id": "http://a/b"}}, "'\\$id' at #/items is supported at the root only"),
    ],
)  # fmt: skip
def test_what_no_grammar_can_say_is_refused_by_its_keyword(
    sampler: Sampler, schema: Json, line: str
) -> None:
    with pytest.raises(RequestError, match=f"json_schema cannot be used: {line}") as refused:
        sampler.validate(SamplingParams(json_schema=schema))

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 400},
        {"type": "integer", "minimum": 2**53 - 2, "maximum": 2**53 + 3},
        {"type": "integer", "minimum": -(10**17) - 6300, "exclusiveMaximum": -(10**17)},
        {"minimum": 0.12345678901234567, "maximum": 0.1234567890123468, "type": "number"},
        {"type": "integer", "minimum": -6.244189567772834e16, "maximum": -6.24418956777283e16},
        {"type": "integer", "exclusiveMinimum": 81124812585872000, "maximum": 81124812585873000},
        {"type": "number", "exclusiveMinimum": 7, "exclusiveMaximum": 7.5},
        {"type": "number", "minimum": -7.001, "exclusiveMaximum": -7},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
        {"allOf": [{"exclusiveMinimum": 1e3}, {"maximum": 1000.5}], "type": "number"},
        {"enum": [2**53, -(2**53), 0.1, 1e-7, 1.5, 12345.6789012345]},
    ],
)
def test_numbers_are_within_their_bounds_to_the_last_digit(schema: Json) -> None:
    exact = Sampler(VOCAB_SIZE, "cpu", tokenizer=TOKENIZER, eos_token_ids=(EOS_TOKEN_ID,))
    for value in values(exact, schema, num=12):
        jsonschema.validate(value, schema)


def test_dates_and_times_are_those_of_the_calendar(sampler: Sampler) -> None:
    date = re.compile(_PATTERNS["date"])
    for year in (0, 1, 4, 100, 400, 1900, 1904, 2000, 2023, 2024, 2100, 9999):
        for month in range(14):
            for day in range(33):
                text = f"{year:04}-{month:02}-{day:02}"
                try:
                    is_date = bool(datetime.date.fromisoformat(text))
                except ValueError:
                    is_date = False
                assert bool(date.fullmatch(text)) is is_date, text
    for value in values(sampler, {"type": "string", "format": "date-time"}):
        assert datetime.datetime.fromisoformat(value).tzinfo is not None
    for value in values(sampler, {"type": "string", "format": "time"}):
        datetime.time.fromisoformat(value)
    for value in values(sampler, {"type": "string", "format": "date", "pattern": "^20"}):
        assert datetime.date.fromisoformat(value).year >= 2000


def reference(i: int) -> Json:
    return {"$ref": f"#/$defs/d{i}"}


@pytest.mark.parametrize(
    "of",
    [
        lambda i: {"allOf": [reference(i), reference(i)]},  # twice as many paths with each level
        lambda i: {"type": "object", "required": ["n"], "properties": {"n": reference(i)}},
        lambda i: {"anyOf": [reference(i), reference(i)], "type": ["object", "null"]},
    ],
)
def test_a_schema_of_many_levels_is_looked_at_in_bounds(of: Any) -> None:
    definitions = {f"d{i}": of(i + 1) for i in range(300)} | {"d300": {"type": "null"}}
    prepare(json.dumps({**reference(0), "$defs": definitions}))


class Colour(enum.Enum):
    RED, GREEN = "red", "green"


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, pydantic.Field(gt=0, le=9, multiple_of=3)]


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    puppies: Annotated[list["Dog"], pydantic.Field(max_length=1)]


class Everything(pydantic.BaseModel):
    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
    tags: set[str]
    colours: frozenset[Colour]
    counts: dict[Colour, int]
    path: pathlib.Path
    secret: pydantic.SecretStr
    data: bytes
    day: datetime.date
    at: datetime.datetime
    time: datetime.time
    id: uuid.UUID
    pair: tuple[int, str | None]
    anything: Any


def test_what_pydantic_writes_is_read_back_by_pydantic(sampler: Sampler) -> None:
    for value in values(sampler, Everything.model_json_schema(), 4):
        Everything.model_validate_json(json.dumps(value))


def test_a_set_may_be_any_set(sampler: Sampler) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b"]}}
    found = {tuple(value) for value in values(sampler, schema, 25)}
    assert found == {(), ("a",), ("b",), ("a", "b")}
