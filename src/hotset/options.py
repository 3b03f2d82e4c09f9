"""What a user asks of an engine, by concern; how it is given, flat; and what does not go together.

From the declaration of an option come its check, its flag, its key in the TOML file and its row in
docs/options.md. What follows from options for a model on a machine is `engine.sizing.Sizes`.

Imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from hotset.errors import ConfigError
from hotset.expert_options import (
    AllResident,
    ExpertBudget,
    ExpertOptions,
    ExpertSlots,
    HostedExperts,
    SplitMemory,
)
from hotset.option_fields import Group, Option, options_of
from hotset.option_groups import (
    FormOptions,
    LayoutOptions,
    MemoryOptions,
    ModelOptions,
    RuntimeOptions,
    ScheduleOptions,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    """All that a user asks of an engine. Nobody changes it; `but` makes another one.

    Names of options are unique over all groups, so that flags, keys of the TOML file and arguments
    of Python are flat: see `of`.

    Raises:
        ConfigError: options that do not go together.
    """

    model: ModelOptions
    memory: MemoryOptions
    experts: ExpertOptions
    schedule: ScheduleOptions
    forms: FormOptions
    layout: LayoutOptions
    runtime: RuntimeOptions

    def __post_init__(self) -> None:
        for problem in _conflicts(self):
            raise ConfigError(problem)

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Options by name; those that are left out, or are None, have their defaults.

        Raises:
            ConfigError: a value that its option does not take, an option without effect, or
                options that do not go together.
        """
        values = {}
        for name, value in given.items():
            one = OPTIONS.get(name)
            if one is None:
                names = ", ".join(sorted(OPTIONS))
                raise ConfigError(f"there is no option {name!r}; expected one of {names}")
            taken = one.check(value)
            if taken != one.default:
                values[name] = taken
        return cls(
            model=_made(ModelOptions, values),
            memory=_made(MemoryOptions, values),
            experts=_experts_of(values),
            schedule=_made(ScheduleOptions, values),
            forms=_made(FormOptions, values),
            layout=_made(LayoutOptions, values),
            runtime=_made(RuntimeOptions, values),
        )

    def but(self, **changes: Any) -> Self:
        """These options with others in place of some; raises what `of` does."""
        return self.of(**{**self.flat(), **changes})

    def flat(self) -> dict[str, Any]:
        """The value of each option by its name; the default where its group does not have it."""
        groups = (getattr(self, one.name) for one in fields(self))
        has = {one.name: getattr(group, one.name) for group in groups for one in fields(group)}
        return {name: has.get(name, one.default) for name, one in OPTIONS.items()}


# By title, in the order of docs/options.md and of the command line's help.
GROUPS: dict[str, type[Group]] = {
    "Model": ModelOptions,
    "Memory": MemoryOptions,
    "Split of memory between KV and experts": SplitMemory,
    "Experts on the device, by number": ExpertSlots,
    "Experts on the device, by size": ExpertBudget,
    "Experts elsewhere": HostedExperts,
    "Steps": ScheduleOptions,
    "Structured output": FormOptions,
    "Several GPUs": LayoutOptions,
    "Process": RuntimeOptions,
}


def own_options(group: type[Group]) -> list[Option]:
    """The options that a group declares itself."""
    return [one for one in options_of(group) if one.name in group.__annotations__]


# An expert has no size of its own where neither option is given.
OPTIONS = {
    one.name: replace(one, is_optional=one.default is None)
    for group in GROUPS.values()
    for one in own_options(group)
}


def _made(group: type[T], values: dict[str, Any]) -> T:
    """A group with those of the values that are its own."""
    return group(**{one.name: values[one.name] for one in options_of(group) if one.name in values})


def _experts_of(values: dict[str, Any]) -> ExpertOptions:
    """How experts are sized, by which option does it.

    Raises:
        ConfigError: two do, or an option has no effect with experts of that kind.
    """
    kind: type[ExpertOptions] = AllResident
    if "expert_slots" in values and "expert_gib" in values:
        raise ConfigError(
            f"expert_slots is {values['expert_slots']} and expert_gib is {values['expert_gib']}; "
            "give one of them"
        )
    if "expert_slots" in values:
        kind = ExpertSlots
    elif "expert_gib" in values:
        kind = ExpertBudget
    elif "hot_gib" in values or "total_gib" in values:
        kind = SplitMemory
    has = {one.name for one in options_of(kind)}
    for one in (*own_options(HostedExperts), *own_options(SplitMemory)):
        if one.name not in values or one.name in has:
            continue
        if one in own_options(SplitMemory):
            why = (
                "without memory to split between KV and experts; give hot_gib or total_gib and "
                "neither expert_slots nor expert_gib, or leave it out"
            )
        else:
            why = (
                "while all experts are on the device; give expert_slots, expert_gib, hot_gib or "
                "total_gib, or leave it out"
            )
        raise ConfigError(f"{one.name} is {_shown(values[one.name])}, which does nothing {why}")
    return _made(kind, values)


def _conflicts(options: Options) -> Iterator[str]:
    """What does not go together, whatever the model: the one list of it."""
    memory, experts, schedule = options.memory, options.experts, options.schedule
    if options.model.index_dtype == "fp8" and (memory.block_size or 0) % 4:
        yield (
            f"block_size is {memory.block_size} and index_dtype is fp8, whose keys have their "
            "scales behind those of their block; give a multiple of 4"
        )
    if (
        options.model.activations == "8"
        and isinstance(experts, HostedExperts)
        and experts.expert_cpu != "off"
    ):
        yield (
            f"activations is 8 and expert_cpu is {experts.expert_cpu}: the CPU multiplies with 16 "
            "bits, and output would depend on which computes an expert; leave one of them out"
        )
    if schedule.rotation_s is not None and memory.host_gib == 0:
        yield (
            f"rotation_s is {schedule.rotation_s} but host_gib is 0; give the host tier a size for "
            "the KV of those that wait, or leave rotation_s out"
        )
    if memory.hot_gib is not None and memory.total_gib is not None:
        yield f"hot_gib is {memory.hot_gib} and total_gib is {memory.total_gib}; give one of them"
    if memory.disk_path is not None and memory.disk_gib == 0:
        yield (
            f"disk_path is {str(memory.disk_path)!r} but disk_gib is 0; give disk_gib a size, or "
            "leave disk_path out"
        )
    yield from _conflicts_of_stores(memory)
    yield from _conflicts_of_events(options.runtime)
    has_budget = memory.hot_gib is not None or memory.total_gib is not None
    if (
        isinstance(experts, SplitMemory) > has_budget
        or isinstance(experts, AllResident) & has_budget
    ):
        yield "hot_gib or total_gib and SplitMemory go together; make options with Options.of"
    if isinstance(experts, HostedExperts):
        yield from _conflicts_of_experts(experts)
    if options.layout.num_gpus > 1:
        yield from _conflicts_of_ranks(options)
    elif options.layout.ep:
        yield "ep is given, which does nothing with one GPU; give tp or dp, or leave it out"


def _conflicts_of_stores(memory: MemoryOptions) -> Iterator[str]:
    for name, where in (("remote", memory.remote), ("peer_url", memory.peer_url)):
        if where and memory.remote_secret_file is None:
            yield (
                f"{name} is {_shown(where)}, and blocks that leave are sealed by a secret; give "
                "remote_secret_file, such as one made by: openssl rand -hex 32"
            )
    if not memory.remote and memory.peer_url is None:
        for one in own_options(MemoryOptions):
            value = getattr(memory, one.name)
            if one.name.startswith("remote_") and value != one.default:
                yield (
                    f"{one.name} is {_shown(value)}, which does nothing without a store or peers; "
                    "give remote or peer_url, or leave it out"
                )


def _conflicts_of_events(runtime: RuntimeOptions) -> Iterator[str]:
    address = runtime.kv_events
    if address is not None and not address.startswith(("tcp://", "ipc://")):
        yield (
            f"kv_events is {_shown(address)}; expected tcp://HOST:PORT or ipc://PATH, such as "
            "tcp://127.0.0.1:5557"
        )
    if address is None and runtime.kv_events_topic:
        yield (
            f"kv_events_topic is {_shown(runtime.kv_events_topic)}, which does nothing without "
            "events; give kv_events, or leave it out"
        )


def _conflicts_of_experts(experts: HostedExperts) -> Iterator[str]:
    streams = experts.expert_plan == "stream"
    if isinstance(experts, ExpertSlots) and experts.expert_slots == 0 and not streams:
        yield "expert_slots is 0; expected 1 or more, or 0 with the expert_plan stream"
    if experts.expert_disk_path is not None and experts.expert_host_gib is None:
        yield (
            f"expert_disk_path is {str(experts.expert_disk_path)!r}, but host memory for experts "
            "has no bound; give expert_host_gib, or leave it out"
        )
    if streams and experts.expert_prefetch:
        yield (
            f"expert_prefetch is {experts.expert_prefetch}, but the plan stream brings all experts "
            "ahead of their layer; leave one of them out"
        )
    if streams and experts.expert_eviction != OPTIONS["expert_eviction"].default:
        yield (
            f"expert_eviction is {experts.expert_eviction!r}, but the plan stream evicts nothing; "
            "leave one of them out"
        )
    if isinstance(experts, SplitMemory) and experts.move_split:
        for name, rest in (("expert_plan", "auto cache"), ("expert_cpu", "off")):
            if (value := getattr(experts, name)) not in rest.split():
                yield (
                    f"move_split is given, but {name} {value} needs the same number of resident "
                    "experts throughout; leave one of them out"
                )


def _conflicts_of_ranks(options: Options) -> Iterator[str]:
    """What works with one GPU alone, and a number of GPUs that is not the layout's."""
    given, layout = options.flat(), options.layout
    word = "tp" if layout.tp > 1 else "dp" if layout.dp > 1 else "gpus"
    if layout.tp > 1 and layout.dp > 1:
        yield f"tp is {layout.tp} and dp is {layout.dp}, which do not go together yet; give one"
    if word != "gpus" and layout.gpus not in (None, layout.spread.gpus):
        yield (
            f"gpus is {layout.gpus}, and {layout.spread} takes {layout.spread.gpus}; give one of "
            "them"
        )
    for name in (
        "expert_cpu",
        "expert_host_gib",
        "move_split",
        "hot_tokens",
        "row_prefetch",
        "remote",
        "peer_url",
    ):
        if (value := given[name]) not in (OPTIONS[name].default, 0):
            yield (
                f"{name} is {_shown(value)}, which works with one GPU; leave it out, or leave "
                f"{word} out"
            )
    if layout.dp > 1 and options.memory.disk_gib:
        yield (
            f"disk_gib is {options.memory.disk_gib}, and with dp there is no disk tier yet; leave "
            "it out, or give tp in place of dp"
        )
    if layout.ep and isinstance(options.experts, ExpertSlots | ExpertBudget):
        name = "expert_slots" if isinstance(options.experts, ExpertSlots) else "expert_gib"
        yield (
            f"{name} is {given[name]}, but with ep all experts stay on the GPUs; leave one of them "
            "out"
        )
    device = options.model.device
    if device not in ("auto", "cpu", "cuda"):
        yield f"device is {device!r}, but {word}={layout.num_gpus} takes the first GPUs; give cuda"


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_without_password, value))
    return repr(str(value) if isinstance(value, Path) else value)
