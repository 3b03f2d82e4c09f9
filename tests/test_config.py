"""A value of another type than its field's is one clear line, whatever the field."""

import dataclasses
import re
import runpy
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from hotset.cli.serve import command
from hotset.config import EngineConfig
from hotset.errors import ConfigError
from hotset.memory.eviction import POLICIES
from hotset.options import Option, options_of

OPTIONS = list(options_of(EngineConfig).values())
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


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_has_a_help_and_says_its_unit(option: Option) -> None:
    assert option.help.endswith(".")
    if option.kind in (int, float) and option.name != "seed":
        assert option.unit
        words = f"{option.name.replace('_s', ' seconds')} {option.help}".lower()
        assert option.unit.lower().rstrip("s") in words, words


def test_eviction_policies_are_those_of_the_registry() -> None:
    assert set(options_of(EngineConfig)["expert_eviction"].choices) == set(POLICIES)


def test_the_page_of_options_is_up_to_date() -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts/make_options_page.py"))
    assert script["PAGE"].read_text() == script["make_page"](), "run scripts/make_options_page.py"


def by_python(name: str, value: Any) -> EngineConfig:
    return EngineConfig(**{name: value})


def by_flag(name: str, value: Any) -> EngineConfig:
    [flags] = [param for param in command.params if param.name == name]
    if isinstance(value, bool):
        return parsed((flags.opts if value else flags.secondary_opts)[:1])
    return parsed([flags.opts[0], str(value)])


def by_file(folder: Path, name: str, value: Any) -> EngineConfig:
    path = folder / "serve.toml"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    path.write_text(f"{name.replace('_', '-')} = {text}\n")
    return parsed(["--config", str(path)])


def parsed(args: list[str]) -> EngineConfig:
    """The options of the engine that `hotset serve` finds in its arguments."""
    with command.make_context("serve", args) as context:
        return EngineConfig(**{n: context.params[n] for n in context.params if n in FIELDS})


def values_of(option: Option) -> list[Any]:
    """One or more values of the option's type, some of which may be out of its range."""
    if option.choices:
        return list(option.choices)
    if option.kind is bool:
        return [not option.default]
    if option.kind in (int, float):
        return [option.kind(number) for number in (-1, 0, 1, 2, 1024, 1025, 2**21)]
    return ["there"]


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.flags], ids=lambda option: option.name)
def test_flags_the_file_and_python_take_and_refuse_the_same(option: Option, tmp_path: Path) -> None:
    for value in values_of(option):
        found: list[Any] = []
        for make in (by_python, by_flag, lambda *given: by_file(tmp_path, *given)):
            try:
                found.append(make(option.name, value))
            except ConfigError as error:
                found.append(str(error).removeprefix(f"{tmp_path}/serve.toml: "))
        assert found[0] == found[1] == found[2], value


@pytest.mark.parametrize(
    ("name", "value"), [("max_num_seqs", 8.5), ("hot_gib", "1"), ("host_gib", True), ("eager", 1)]
)
def test_the_file_refuses_the_types_that_python_does(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as by_name:
        by_python(name, value)
    with pytest.raises(ConfigError) as in_file:
        by_file(tmp_path, name, value)
    assert str(in_file.value) == f"{tmp_path}/serve.toml: {by_name.value}"
