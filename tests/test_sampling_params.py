import pickle
from typing import Any

import pytest

from hotset.errors import RequestError
from hotset.request import SamplingParams, TextForm


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_tokens", "5", "a whole number or None"),
        ("max_tokens", 5.0, "a whole number or None"),
        ("n", True, "a whole number"),
        ("n", None, "a whole number"),
        ("seed", "1", "a whole number or None"),
        ("temperature", "0", "a number"),
        ("temperature", None, "a number"),
        ("top_p", [1], "a number"),
        ("ignore_eos", 1, "True or False"),
        ("stop", 3, "a text or a list of texts"),
        ("stop", [3], "a text or a list of texts"),
        ("stop", b"x", "a text or a list of texts"),
        ("stop_token_ids", 3, "a list of token ids"),
        ("stop_token_ids", ["3"], "a list of token ids"),
        ("logit_bias", {"3": 1.0}, "numbers by token id"),
        ("logit_bias", [3], "numbers by token id"),
        ("json_schema", "{}", "a JSON schema as a dict or None"),
        ("text_form", "a+", "a TextForm or None"),
    ],
)
def test_values_of_another_type_are_refused_by_name(field: str, value: Any, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert str(caught.value) == f"{field} is {value!r}; expected {expected}"
    assert caught.value.param == field


def test_values_become_those_of_their_fields() -> None:
    numpy = pytest.importorskip("numpy")
    params = SamplingParams(
        stop="END",  # type: ignore[arg-type]
        stop_token_ids=[3],  # type: ignore[arg-type]
        max_tokens=numpy.int64(4),
        temperature=1,
    )
    assert params.stop == ("END",) and params.stop_token_ids == (3,)
    assert type(params.max_tokens) is int and type(params.temperature) is float
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="temperature is nan"):
        SamplingParams(temperature=float("nan"))


def test_params_with_every_kind_of_value_pass_through_a_pipe() -> None:
    params = SamplingParams(logit_bias={3: 1}, stop=("a",), text_form=TextForm("regex", "a+"))
    assert pickle.loads(pickle.dumps(params)) == params
    assert SamplingParams().logit_bias == {} and params.logit_bias == {3: 1.0}
