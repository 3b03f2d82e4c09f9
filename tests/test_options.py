"""Options: one declaration gives check, flag, TOML key and help; and what is refused.

A value of another type than its option's is one clear line, whatever the option.
"""

import dataclasses
import pickle
import re
import runpy
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from hotset.cli.options import as_typed
from hotset.cli.serve import command
from hotset.errors import ConfigError
from hotset.eviction import POLICIES
from hotset.expert_options import AllResident, ExpertBudget, ExpertSlots, HostedExperts, SplitMemory
from hotset.option_fields import Option
from hotset.option_groups import MemoryOptions
from hotset.options import GROUPS, OPTIONS, Options, own_options

FIELDS = list(OPTIONS)
# None of these is what any field holds.
WRONG: list[Any] = [[], {}, b"1", object(), 1 + 2j, lambda: 1]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_other_types(name: str) -> None:
    is_list = OPTIONS[name].kind == tuple[str, ...]  # of which an empty one is one
    for value in WRONG[is_list:]:
        with pytest.raises(ConfigError, match=f"{name} is {re.escape(repr(value))}; expected "):
            Options.of(**{name: value})


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
        Options.of(**{name: value})


def test_numbers_and_paths_of_other_kinds_become_pythons_own() -> None:
    options = Options.of(
        model=PurePosixPath("folder/model"), hot_gib=Fraction(3, 2), disk_gib=1, disk_path="folder"
    )
    memory = options.memory

    assert (options.model.model, memory.hot_gib, memory.disk_gib) == ("folder/model", 1.5, 1)
    assert memory.disk_path == Path("folder")
    assert type(memory.hot_gib) is float
    assert options.but(seed=1).memory.disk_path == Path("folder")
    assert dataclasses.replace(memory, host_gib=2).disk_path == Path("folder")


def test_each_default_is_taken_as_it_is() -> None:
    values = Options.of().flat()

    assert list(values) == FIELDS
    for name, option in OPTIONS.items():
        assert values[name] is option.default
        assert Options.of(**{name: option.default}) == Options.of()


def test_a_group_refuses_what_its_options_do() -> None:
    with pytest.raises(ConfigError, match="hot_gib is '1'; expected a number or None"):
        MemoryOptions(hot_gib="1")
    with pytest.raises(ConfigError, match="expert_slots is None; expected a whole number"):
        ExpertSlots()
    with pytest.raises(ConfigError, match="make options with"):
        dataclasses.replace(Options.of(), memory=MemoryOptions(hot_gib=1.0))
    with pytest.raises(ConfigError, match="there is no option 'hot_gb'; expected one of"):
        Options.of(hot_gb=1)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, AllResident),
        ({"host_gib": 1.0}, AllResident),
        ({"expert_slots": 3}, ExpertSlots),
        ({"expert_gib": 3.0, "hot_gib": 1.0}, ExpertBudget),
        ({"expert_slots": 0, "expert_plan": "stream", "total_gib": 1.0}, ExpertSlots),
        ({"hot_gib": 1.0}, SplitMemory),
        ({"total_gib": 1.0, "expert_prefetch": 2, "move_split": True}, SplitMemory),
    ],
)
def test_what_sizes_the_experts_decides_on_their_options(
    given: dict[str, Any], kind: type[Any]
) -> None:
    options = Options.of(**given)
    assert type(options.experts) is kind
    assert options.but() == options == pickle.loads(pickle.dumps(options))
    assert {name: options.flat()[name] for name in given} == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rotation_s": 1.0}, "rotation_s is 1.0 but host_gib is 0; give the host tier a size"),
        ({"hot_gib": 1.0, "total_gib": 2.0}, "hot_gib is 1.0 and total_gib is 2.0; give one of"),
        ({"disk_path": "a"}, "disk_path is 'a' but disk_gib is 0; give disk_gib a size"),
        ({"expert_slots": 1, "expert_gib": 1.0}, "expert_slots is 1 and expert_gib is 1.0; give"),
        ({"expert_plan": "cache"}, "expert_plan is 'cache', which does nothing while all experts"),
        ({"expert_host_gib": 1.0}, "expert_host_gib is 1.0, which does nothing while all experts"),
        ({"expert_disk_path": "a"}, "expert_disk_path is 'a', which does nothing while all"),
        ({"expert_slots": 1, "expert_disk_path": "a"}, "host memory for experts has no bound"),
        ({"expert_slots": 0}, "expert_slots is 0; expected 1 or more, or 0 with the expert_plan"),
        (
            {"expert_slots": 1, "expert_plan": "stream", "expert_prefetch": 1},
            "expert_prefetch is 1, but the plan stream brings all experts ahead of their layer",
        ),
        (
            {"expert_slots": 1, "expert_plan": "stream", "expert_eviction": "lfu"},
            "expert_eviction is 'lfu', but the plan stream evicts nothing",
        ),
        ({"target": "latency"}, "target is 'latency', which does nothing without memory to split"),
        (
            {"remote": "redis://me:word@host:1"},
            "remote is redis://host:1, and blocks that leave are sealed by a secret; give "
            "remote_secret_file",
        ),
        (
            {"remote_encrypt": True},
            "remote_encrypt is True, which does nothing without a store or peers",
        ),
        (
            {"remote": "unix:///s?password=word", "remote_secret_file": "a", "tp": 2},
            "remote is unix:///s, which works with one GPU",
        ),
        ({"expert_slots": 1, "hot_gib": 1.0, "move_split": True}, "move_split is True, which does"),
        (
            {"hot_gib": 1.0, "move_split": True, "expert_plan": "stream"},
            "move_split is given, but expert_plan stream needs the same number",
        ),
        (
            {"hot_gib": 1.0, "move_split": True, "expert_cpu": "auto"},
            "move_split is given, but expert_cpu auto needs the same number",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Options.of(**given)


def test_every_option_is_declared_once_with_help_and_its_unit() -> None:
    names = [one.name for group in GROUPS.values() for one in own_options(group)]
    assert names == FIELDS and len(set(names)) == len(names)
    for option in OPTIONS.values():
        assert option.help.endswith("."), option.name
        is_number = option.kind in (int, float) and option.name != "seed"
        words = f"{option.name} {option.help}".lower()
        units = ("gib", "_s ", "tokens", "num_seqs", "experts", "requests", "digits", "characters")
        others = ("items", "levels", "threads", "seconds", "gpus")
        assert not is_number or any(unit in words for unit in (*units, *others)), option.name
        assert is_number or option.bounds is None


def test_the_choices_of_eviction_are_the_policies_that_there_are() -> None:
    assert set(OPTIONS["expert_eviction"].choices) == set(POLICIES)
    assert OPTIONS["expert_slots"].name not in {one.name for one in own_options(HostedExperts)}


def test_the_page_of_options_is_up_to_date() -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts/make_options_page.py"))
    assert script["PAGE"].read_text() == script["make_page"](), "run scripts/make_options_page.py"


def by_python(name: str, value: Any) -> Options:
    return Options.of(**{name: value})


def by_flag(name: str, value: Any) -> Options:
    [flags] = [param for param in command.params if param.name == name]
    if isinstance(value, bool):
        return parsed((flags.opts if value else flags.secondary_opts)[:1])
    return parsed([flags.opts[0], str(value)])


def by_file(folder: Path, name: str, value: Any) -> Options:
    path = folder / "serve.toml"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    path.write_text(f"{name.replace('_', '-')} = {text}\n")
    return parsed(["--config", str(path)])


def parsed(args: list[str]) -> Options:
    """The options of the engine that `hotset serve` finds in its arguments."""
    with command.make_context("serve", args) as context:
        return Options.of(**{n: context.params[n] for n in context.params if n in FIELDS})


def values_of(option: Option) -> list[Any]:
    """One or more values of the option's type, some of which may be out of its range."""
    if option.choices:
        return list(option.choices)
    if option.kind is bool:
        return [not option.default]
    if option.kind in (int, float):
        return [option.kind(number) for number in (-1, 0, 1, 2, 1024, 1025, 2**21)]
    return ["there"]


@pytest.mark.parametrize("name", [one.name for one in OPTIONS.values() if one.flags])
def test_flags_the_file_and_python_take_and_refuse_the_same(name: str, tmp_path: Path) -> None:
    for value in values_of(OPTIONS[name]):
        found: list[Any] = []
        for make in (by_python, by_flag, lambda *given: by_file(tmp_path, *given)):
            try:
                found.append(make(name, value))
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


def test_an_error_names_an_option_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("hot_gib = 1\n")
    with command.make_context("serve", ["--config", str(path), "--total-gib", "2"]) as context:
        told = as_typed("hot_gib is 1.0 and total_gib is 2.0; give less top_k", context)
        assert told == "hot_gib is 1.0 and --total-gib is 2.0; give less top_k"
        assert as_typed("threads is 0; leave threads out", context) == (
            "--threads is 0; leave --threads out"
        )
        assert as_typed("the model has 3 threads", context) == "the model has 3 threads"
