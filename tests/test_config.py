"""A value of another type than its field's is one clear line, whatever the field."""

import dataclasses
import re
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from hotset.config import EngineConfig
from hotset.errors import ConfigError

FIELDS = [field.name for field in dataclasses.fields(EngineConfig)]
# None of these is what any field holds.
WRONG: list[Any] = [[], {}, b"1", object(), 1 + 2j, lambda: 1]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_other_types(name: str) -> None:
    for value in WRONG:
        with pytest.raises(ConfigError, match=f"{name} is {re.escape(repr(value))}; expected "):
            EngineConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hot_gib", "1", "hot_gib is '1'; expected a number or None"),
        ("host_gib", None, "host_gib is None; expected a number"),
        ("host_gib", True, "host_gib is True; expected a number"),
        ("max_num_seqs", "8", "max_num_seqs is '8'; expected a whole number"),
        ("max_num_seqs", 8.0, "max_num_seqs is 8.0; expected a whole number"),
        ("eager", 1, "eager is 1; expected True or False"),
        ("eager", "no", "eager is 'no'; expected True or False"),
        ("dtype", "int8", "dtype is 'int8'; expected auto, float32, bfloat16, float16 or fp8"),
        ("target", None, "target is None; expected throughput or latency"),
        ("device", None, "device is None; expected a text"),
        ("disk_path", 3, "disk_path is 3; expected a path or None"),
        ("threads", float("nan"), "threads is nan; expected a whole number or None"),
        ("max_num_seqs", 10**12, "max_num_seqs is 1000000000000; expected 1 to 1048576"),
        ("disk_read_deadline_s", float("nan"), "is nan; expected above 0 seconds"),
    ],
)
def test_what_was_expected_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineConfig(**{name: value})


def test_numbers_and_paths_of_other_kinds_become_pythons_own() -> None:
    config = EngineConfig(
        model=PurePosixPath("folder/model"),  # type: ignore[arg-type]
        hot_gib=Fraction(3, 2),  # type: ignore[arg-type]
        disk_gib=1,
        disk_path="folder",  # type: ignore[arg-type]
    )

    assert (config.model, config.hot_gib, config.disk_gib) == ("folder/model", 1.5, 1)
    assert config.disk_path == Path("folder")
    assert type(config.hot_gib) is float
    assert dataclasses.replace(config, seed=1).disk_path == Path("folder")


def test_each_default_is_taken_as_it_is() -> None:
    config = EngineConfig()

    for field in dataclasses.fields(EngineConfig):
        assert getattr(config, field.name) is field.default
