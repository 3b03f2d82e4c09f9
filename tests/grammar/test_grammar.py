import json
import re
from typing import Any

import pytest
import torch
from sampling import sample
from tiny_tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, make_tokenizer

from hotset.errors import RequestError
from hotset.executor.sampler import Sampler
from hotset.request import SamplingParams, TextForm
from hotset.sequence import Request

TOKENIZER = make_tokenizer()
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "ok": {"enum": ["yes", "no"]},
    },
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}


def make_sampler(vocab_size: int = VOCAB_SIZE) -> Sampler:
    return Sampler(
        vocab_size, "cpu", tokenizer=TOKENIZER, eos_token_ids=(EOS_TOKEN_ID, TOKENIZER.pad_token_id)
    )


def generate(sampler: Sampler, params: SamplingParams, seed: int, *, most: int = 300) -> list[int]:
    """Tokens from random logits up to the end of sequence."""
    request = Request("r", 1, [5], params, 10_000)
    generator = torch.Generator().manual_seed(seed)
    while request.num_output_tokens < most:
        logits = torch.randn(1, sampler.vocab_size, generator=generator) * 2
        sampled = sample(sampler, logits, [request])
        assert not sampled.errors
        request.token_ids += sampled.token_ids
        if sampled.token_ids[0] in (EOS_TOKEN_ID, TOKENIZER.pad_token_id):
            break
    sampler.release("r")
    return request.output_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, VOCAB_SIZE + 24])
def test_random_logits_make_json_of_the_schema(temperature: float, vocab_size: int) -> None:
    # Some models have more logits than their tokenizer has tokens.
    sampler = make_sampler(vocab_size)
    for seed in range(5):
        params = SamplingParams(json_schema=PERSON, temperature=temperature, seed=seed)
        ids = generate(sampler, params, seed)
        assert ids[-1] in (EOS_TOKEN_ID, TOKENIZER.pad_token_id)
        person = json.loads(TOKENIZER.decode(ids, skip_special_tokens=True))
        assert set(person) == {"name", "age", "ok"}
        assert 0 <= person["age"] <= 150
        assert len(person["name"]) <= 8
        assert person["ok"] in ("yes", "no")


def test_after_complete_json_only_the_end_of_sequence_is_left() -> None:
    sampler = make_sampler()
    request = Request("r", 1, [5], SamplingParams(json_schema={"const": True}), 100)
    text = TOKENIZER.encode("true")
    for token in text:
        logits = torch.zeros(1, VOCAB_SIZE)
        logits[0, token] = 9.0
        assert sample(sampler, logits, [request]).token_ids == [token]
        request.token_ids.append(token)
    logits = torch.arange(VOCAB_SIZE, dtype=torch.float32)[None]

    assert sample(sampler, logits, [request]).token_ids == [EOS_TOKEN_ID]


def test_other_rows_of_the_batch_are_not_masked() -> None:
    sampler = make_sampler()
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    batch = [
        SamplingParams(logprobs=1),
        SamplingParams(json_schema=PERSON),
        SamplingParams(repetition_penalty=1.1),
    ]
    requests = [Request(str(i), 1, [5], params, 100) for i, params in enumerate(batch)]
    tokens = sample(sampler, logits, requests).token_ids

    assert tokens[0] == logits[0].argmax()
    assert TOKENIZER.decode([tokens[1]]).startswith("{")
    assert tokens[2] == logits[2].argmax()


def test_two_requests_with_one_schema_advance_apart() -> None:
    sampler = make_sampler()
    params = SamplingParams(json_schema={"enum": [True, False]})
    requests = [Request("r", 1, [5], params, 100, index) for index in range(2)]
    logits = torch.zeros(2, VOCAB_SIZE)
    [t], [f] = TOKENIZER.encode("true")[:1], TOKENIZER.encode("false")[:1]
    logits[0, t], logits[1, f] = 9.0, 9.0
    first = sample(sampler, logits, requests).token_ids
    for request, token in zip(requests, first, strict=True):
        request.token_ids.append(token)
    second = sample(sampler, torch.zeros(2, VOCAB_SIZE), requests).token_ids

    assert first == [t, f]
    assert "true".startswith(TOKENIZER.decode([t, second[0]]))
    assert "false".startswith(TOKENIZER.decode([f, second[1]]))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "foo"},
        {"$ref": "#/nowhere"},
        {"type": "array", "uniqueItems": True, "items": {"enum": list(range(9))}},
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "string", "pattern": "("},
        {"$ref": "http://localhost/schema.json"},
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_in_one_line(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="json_schema") as refused:
        make_sampler().validate(SamplingParams(json_schema=schema))

    assert "\n" not in str(refused.value)


def test_a_schema_is_refused_where_it_could_never_end() -> None:
    any_json = SamplingParams(json_schema={})
    with pytest.raises(RequestError, match="tokenizer"):
        Sampler(VOCAB_SIZE, "cpu").validate(any_json)
    with pytest.raises(RequestError, match="end-of-sequence"):
        Sampler(VOCAB_SIZE, "cpu", tokenizer=TOKENIZER).validate(any_json)
    with pytest.raises(RequestError, match="ignore_eos"):
        make_sampler().validate(SamplingParams(json_schema={}, ignore_eos=True))
    make_sampler().validate(any_json)


def test_a_grammar_that_fails_on_the_way_is_reported_for_its_request() -> None:
    sampler = make_sampler()
    request = Request("r", 1, [5], SamplingParams(json_schema=PERSON), 100)
    matcher = sampler._matcher(request.sampling)
    matcher.consume_token(TOKENIZER.encode("cat")[0])  # puts it into its error state
    sampled = sample(sampler, torch.zeros(1, VOCAB_SIZE), [request])

    assert list(sampled.errors) == [request.sequence_id]


def json_texts(sampler: Sampler, schema: dict[str, Any], num: int = 8) -> list[str]:
    """Finished outputs of random logits, under several seeds."""
    texts = []
    for seed in range(num):
        params = SamplingParams(json_schema=schema, temperature=1.0, seed=seed)
        ids = generate(sampler, params, seed, most=2000)
        assert ids[-1] in (EOS_TOKEN_ID, TOKENIZER.pad_token_id)
        texts.append(TOKENIZER.decode(ids, skip_special_tokens=True))
    return texts


def words(sampler: Sampler, text_form: TextForm, num: int = 8) -> set[str]:
    """Outputs of random logits, under several seeds."""
    texts = set()
    for seed in range(num):
        params = SamplingParams(text_form=text_form, temperature=1.0, seed=seed)
        ids = generate(sampler, params, seed)
        assert ids[-1] in (EOS_TOKEN_ID, TOKENIZER.pad_token_id)
        texts.add(TOKENIZER.decode(ids, skip_special_tokens=True))
    return texts


def test_an_output_follows_a_regex_a_choice_or_a_grammar() -> None:
    sampler = make_sampler()
    choices = ["yes", 'no "at\n all" \\', "žluťoučký 😀", "yesterday"]
    for text in words(sampler, TextForm("regex", r"a{2,4}-(7|19)\.")):
        assert re.fullmatch(r"a{2,4}-(7|19)\.", text)
    found = words(sampler, TextForm("choice", json.dumps(choices)), 30)
    assert len(found) > 1
    assert found <= set(choices)
    lark = 'start: "(" item ("," item)? ")"\nitem: "a" | "b"'
    gbnf = 'root ::= "(" item ("," item)? ")"\nitem ::= "a" | "b"'
    for source in (lark, gbnf):
        for text in words(sampler, TextForm("grammar", source)):
            assert re.fullmatch(r"\([ab](,[ab])?\)", text)


@pytest.mark.parametrize(
    ("form", "line"),
    [
        (TextForm("regex", "("), "regex cannot be used: .*unclosed group"),
        (TextForm("regex", r"[^\s\S]"), "regex cannot be used: no text at all"),
        (TextForm("grammar", 'start: start "a"'), "grammar cannot be used: no text at all"),
        (TextForm("regex", "(?=a)b"), "regex cannot be used: .*look-around"),
        (TextForm("choice", "[]"), "choice cannot be used: expected a list of texts"),
        (TextForm("choice", '["a", 1]'), "choice cannot be used: expected a list of texts"),
        # Not checked as other schemas are: this one would end the process.
        (
            TextForm("grammar", 'start: "a" %json {"const": -9223372036854775808}'),
            "grammar cannot be used: it has %json in it; a schema can be given by itself",
        ),
        (TextForm("grammar", "start: nothing"), "grammar cannot be used: .*nothing"),
        (TextForm("grammar", 'root ::= "a'), "grammar cannot be used: expected Lark"),
    ],
)
def test_a_form_that_cannot_be_used_is_refused_in_one_line(form: TextForm, line: str) -> None:
    with pytest.raises(RequestError, match=line) as refused:
        make_sampler().validate(SamplingParams(text_form=form))

    assert "\n" not in str(refused.value)


def test_a_form_cannot_be_asked_for_beside_a_schema() -> None:
    with pytest.raises(RequestError, match="json_schema and regex"):
        SamplingParams(json_schema={}, text_form=TextForm("regex", "a"))


def test_an_output_that_ends_before_it_is_complete_is_an_error() -> None:
    sampler = make_sampler()
    request = Request("r", 1, [5], SamplingParams(json_schema=PERSON), 100)
    matcher = sampler._matcher(request.sampling)
    matcher.consume_token(TOKENIZER.encode("{")[0])
    matcher.consume_token(EOS_TOKEN_ID)

    assert matcher.error == (
        "json_schema cannot be followed: the output ended before it was complete"
    )


REF = {"$ref": "#"}
PAIR = {"type": "object", "required": ["left"], "properties": {"left": {"$ref": "#/$defs/pair"}}}


@pytest.mark.parametrize(
    "schema",
    [
        REF,
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"type": "object", "properties": {"a": REF}, "required": ["a"]},
        {"type": "array", "items": REF, "minItems": 1},
        {"$ref": "#/$defs/pair", "$defs": {"pair": PAIR}},
        {"allOf": [{"type": "object", "required": ["a"]}, {"properties": {"a": REF}}]},
        {"anyOf": [REF, {"type": "array", "prefixItems": [True, REF], "minItems": 2}]},
        {"anyOf": []},
        {"enum": []},
        {"not": {}},
        {"allOf": [{"type": "string"}, {"type": "null"}]},
        {"allOf": [{"enum": ["a", "b"]}, {"enum": ["c"]}]},
        {"type": "integer", "const": "a"},
        {"type": "number", "minimum": 5, "maximum": 1},
        {"type": "number", "exclusiveMinimum": 5, "exclusiveMaximum": 5},
        {"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 6},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "string", "pattern": "^a$", "minLength": 3},
        {"type": "array", "items": False, "minItems": 1},
        {"type": "object", "required": ["x"], "additionalProperties": False},
        {"type": "object", "minProperties": 2, "maxProperties": 1},
    ],
)
def test_a_schema_without_a_value_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="json_schema") as refused:
        make_sampler().validate(SamplingParams(json_schema=schema))

    assert "\n" not in str(refused.value)


def test_a_refusal_says_where_a_schema_needs_itself() -> None:
    schema = {"type": "object", "required": ["tree"], "properties": {"tree": PAIR}}
    with pytest.raises(RequestError, match="required at #/tree/left"):
        make_sampler().validate(SamplingParams(json_schema={**schema, "$defs": {"pair": PAIR}}))


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [REF, {"type": "null"}]},
        {"type": "array", "items": REF},
        {"type": "object", "properties": {"a": REF}, "additionalProperties": False},
        {
            "type": "object",
            "required": ["next"],
            "properties": {"next": {"anyOf": [REF, {"type": "null"}]}},
            "additionalProperties": False,
        },
    ],
)
def test_a_schema_that_may_hold_itself_ends(schema: dict[str, Any]) -> None:
    sampler = make_sampler()
    for seed in range(4):
        params = SamplingParams(json_schema=schema, temperature=1.0, seed=seed)
        ids = generate(sampler, params, seed, most=2000)
        json.loads(TOKENIZER.decode(ids, skip_special_tokens=True))


def test_what_may_be_left_out_is_where_it_could_never_end() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/pair"}, "b": {"type": "null"}},
        "additionalProperties": False,
        "$defs": {"pair": PAIR},
    }
    for text in json_texts(make_sampler(), schema):
        assert json.loads(text) in ({}, {"b": None})


@pytest.mark.parametrize(
    ("schema", "line"),
    [
        ({"properties": []}, "'properties' at # is of type array; expected object"),
        ({"properties": {"a": 1}}, "#/properties/a is of type integer; expected a schema"),
        ({"anyOf": {}}, "'anyOf' at # is of type object; expected array"),
        (
            {"allOf": [{"items": 1}]},
            "'items' at #/allOf/0 is of type integer; expected object or boolean or array",
        ),
        ({"const": float("nan")}, "cannot be written as JSON"),
    ],
)
def test_a_malformed_schema_is_refused_by_its_place(schema: dict[str, Any], line: str) -> None:
    with pytest.raises(RequestError, match=line):
        make_sampler().validate(SamplingParams(json_schema=schema))
