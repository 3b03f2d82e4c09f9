import json
from pathlib import Path

import pytest

from hotset.cost.catalog import find_config
from hotset.cost.hardware import load_hardware
from hotset.cost.routing import load_histogram
from hotset.errors import ConfigError, HotsetError, PlanError
from hotset.foreign_text import MOST_DEPTH, ForeignTextError, parse_json, parse_toml

DEEP = "[" * 100_000


def nested(depth: int) -> str:
    return '{"a": [' * (depth // 2) + "]}" * (depth // 2)


@pytest.mark.parametrize(
    "text", ['{"a": [1, "é"], "b": null}', "[]", "3", '"\\ud83d\\ude00"', nested(MOST_DEPTH)]
)
def test_json_is_read_as_the_standard_library_reads_it(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)
    assert parse_json(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)


def test_brackets_within_strings_do_not_nest() -> None:
    values = [{"a": '[{"\\"[' * 300}, "]" * 300, ["\\", "{" * 500]]
    assert parse_json(json.dumps(values)) == values
    assert parse_json(json.dumps([[]] * 1000)) == [[]] * 1000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON from line 1, column 2 on"),
        (b"\xff", "is not JSON: its byte 0 is not UTF-8"),
        ("", "is not JSON from line 1, column 1 on"),
        ("9" * 5000, "a number has too many digits"),
        (DEEP, "is nested too deeply"),
        (DEEP + "]" * 100_000, "is nested too deeply"),
        ('{"a":' * 100_000, "is nested too deeply"),
        (nested(MOST_DEPTH + 2), "is nested too deeply: more than 200 levels"),
        # A string without an end, each of whose quotes could begin another; hours, if they do.
        (
            "[[]," + "[]," * MOST_DEPTH + '"' + '\\"' * 500_000,
            "is not JSON from line 1, column 605",
        ),
        ("[[]," + "[]," * MOST_DEPTH + '"\\', "is not JSON from line 1, column 605"),
    ],
)
def test_whatever_is_wrong_with_json_is_one_error(text: str | bytes, says: str) -> None:
    with pytest.raises(ForeignTextError, match=says) as caught:
        parse_json(text)
    assert isinstance(caught.value, HotsetError) and "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_refused_where_it_has_to_be_written_again() -> None:
    half, whole = '{"\\ud800": 1}', '{"\\ud83d\\ude00": 1}'
    assert parse_json(half) == {"\ud800": 1}
    assert parse_json(whole, check_unicode=True) == {"\U0001f600": 1}
    with pytest.raises(ForeignTextError, match="half a surrogate pair"):
        parse_json(half, check_unicode=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"a", "is not TOML"),
        (b"\xff", "is not TOML: its byte 0 is not UTF-8"),
        (f"a = {DEEP}".encode(), "is nested too deeply"),
    ],
)
def test_whatever_is_wrong_with_toml_is_one_error(text: bytes, says: str) -> None:
    with pytest.raises(ForeignTextError, match=says):
        parse_toml(text)
    assert parse_toml(b"a = 1") == {"a": 1}


def test_files_given_to_the_planner_may_be_deep(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": ' * 100_000)
    for read in (find_config, load_hardware):
        with pytest.raises(PlanError, match="nested too deeply"):
            read(str(file))
    with pytest.raises(PlanError, match="nested too deeply"):
        load_histogram(file)


def test_a_trace_may_be_deep(tmp_path: Path) -> None:
    from hotset.bench.trace import read_trace

    file = tmp_path / "trace.jsonl"
    file.write_text(DEEP)
    with pytest.raises(ConfigError, match="line 1"):
        read_trace(file)
