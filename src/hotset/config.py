"""What was asked of an engine: one frozen dataclass, read once and never changed.

A field is declared with its help, unit and range; the flags of the command line, the keys of the
TOML file, the checks and docs/options.md come from the fields. Imports no torch.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hotset.errors import ConfigError
from hotset.options import Range, option, options_of

GIB = 2**30

_SIZE = Range("a size above 0 GiB", lambda size: 0 < size < math.inf)
_TIER_SIZE = Range("0 (none) or a size in GiB", lambda size: 0 <= size < math.inf)
_COUNT = Range("1 or more", lambda count: count >= 1)
_SECONDS = Range("above 0 seconds", lambda length: length > 0)
_FIXED_TEXT = "needs the same number of resident experts throughout; leave one of them out"
_SLOTS_TEXT = "1 or more, or 0 with the expert_plan stream"

# What says how experts in host memory come.
HOST_EXPERT_OPTIONS = (
    "expert_plan",
    "expert_eviction",
    "expert_cold_dtype",
    "expert_prefetch",
    "expert_host_gib",
    "expert_cpu",
)
# What only a split of memory between KV and experts heeds.
SPLIT_OPTIONS = (
    "target",
    "expected_users",
    "expected_prompt_tokens",
    "expected_output_tokens",
    "move_split",
)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine may use, and how it runs: see the help of each field, or docs/options.md.

    Raises:
        ConfigError: a value that its field does not take, or two that do not go together.
    """

    model: str | None = option(
        None,
        "A folder, a .gguf file or a hub id.",
        if_none="SmolLM2-135M-Instruct",
        flags=("--model", "-m"),
    )
    device: str = option("auto", "auto, cpu or cuda.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = option(
        "auto",
        "Of weights and KV; auto is float32 on the CPU, the checkpoint's own on a GPU; fp8 has "
        "8-bit weights in linear layers and bfloat16 elsewhere.",
        details="The 8-bit floats are e4m3 with a scale for each output: near half the bytes, and "
        "not exact.",
    )
    kv_dtype: Literal["auto", "fp8"] = option(
        "auto",
        "Of stored KV; auto is the dtype above, fp8 takes half of its bytes and is not exact.",
        details="The 8-bit floats are e4m3, with the scales of the checkpoint where it has some.",
    )
    hot_gib: float | None = option(
        None,
        "KV memory beside the chip, in GiB; of an MoE model KV and experts together, unless "
        "--expert-slots or --expert-gib sizes those.",
        details="The cost model splits it between KV and experts.",
        unit="GiB",
        within=_SIZE,
        if_none="what the weights leave",
    )
    total_gib: float | None = option(
        None,
        "All memory to use beside the chip, in GiB: weights, experts, KV and workspace. Instead "
        "of --hot-gib.",
        details="It is split likewise.",
        unit="GiB",
        within=_SIZE,
    )
    target: Literal["throughput", "latency"] = option(
        "throughput",
        "What the split between KV and experts is best for.",
        details="`throughput` is the most tokens per second of `--expected-users` that queue for "
        "ever; `latency` is the shortest step that all of them decode in.",
    )
    expected_users: int | None = option(
        None,
        "Requests at once that the split is for.",
        unit="requests",
        within=_COUNT,
        if_none="--max-num-seqs; 8 for latency",
    )
    expected_prompt_tokens: int | None = option(
        None,
        "Their prompts, in tokens.",
        details="With a shorter longest context it is four fifths of that, if not given.",
        unit="tokens",
        within=_COUNT,
        if_none="1024",
    )
    expected_output_tokens: int | None = option(
        None,
        "Their answers, in tokens.",
        details="With a shorter longest context it is a fifth of that, if not given.",
        unit="tokens",
        within=_COUNT,
        if_none="256",
    )
    move_split: bool = option(
        False, "Have the split between KV and experts follow the load while the engine runs."
    )
    host_gib: float = option(
        0.0, "Host memory for KV, in GiB; 0 is none.", unit="GiB", within=_TIER_SIZE
    )
    disk_gib: float = option(
        0.0, "Disk space for KV, in GiB; 0 is none.", unit="GiB", within=_TIER_SIZE
    )
    disk_path: Path | None = option(
        None, "Folder of the disk tier.", if_none="in the platform's cache folder"
    )
    expert_slots: int | None = option(
        None,
        "Experts of a layer to keep beside the chip, the others in host memory.",
        unit="experts",
        within=Range(_SLOTS_TEXT, lambda count: count >= 0),
        if_none="all",
    )
    expert_gib: float | None = option(
        None,
        "The same by size: memory for experts beside the chip, in GiB.",
        unit="GiB",
        within=_SIZE,
    )
    expert_host_gib: float | None = option(
        None,
        "Host memory for experts, in GiB, the others on disk.",
        unit="GiB",
        within=_SIZE,
        if_none="what they take",
    )
    expert_disk_path: Path | None = option(
        None, "Folder for experts on disk.", if_none="in the platform's cache folder"
    )
    expert_plan: Literal["auto", "cache", "stream"] = option(
        "auto",
        "How other experts come: those a step needs, or all, ahead of it; auto by its tokens.",
        details="`cache` copies those that a step needs into slots. `stream` copies all of them "
        "while the layer before computes. `auto` takes for each step the one that is expected to "
        "take less time. With experts on disk it is `cache`.",
    )
    expert_cpu: Literal["off", "auto", "on"] = option(
        "off",
        "On a GPU, have the CPU compute experts in host memory in small steps; auto where it is "
        "faster. Rounds otherwise than the GPU.",
        details="`auto` goes by what is measured at start; `on` is in all such steps. As far as "
        "rounding goes, output then depends on which experts are resident.",
    )
    expert_eviction: Literal["least-stale", "lru", "lfu", "lifo"] = option(
        "lru", "Which expert makes room for another."
    )
    expert_cold_dtype: Literal["auto", "fp8", "int4"] = option(
        "auto",
        "Of experts in host memory; auto is their own, the others have fewer bytes to move and are "
        "not exact.",
        details="`fp8` takes about half of the bytes of bfloat16, `int4` about a quarter. All "
        "experts have the values that come back from there, so that the output does not depend on "
        "which are on the device.",
    )
    expert_prefetch: int = option(
        0,
        "Experts of the next layer to copy while one computes, by its router's guess; 0 is none.",
        details="Works in steps of the plan `cache`. The next layer's router guesses from this "
        "layer's input. It helps where the link would be idle: a wrong guess costs a copy.",
        unit="experts",
        within=Range("0 (none) or more experts of a layer", lambda count: count >= 0),
    )
    block_size: int = option(
        16,
        "Tokens a KV block holds.",
        unit="tokens",
        within=Range("1 to 1024 tokens", lambda count: 1 <= count <= 1024),
    )
    max_num_seqs: int = option(
        256,
        "Most requests in one step.",
        unit="requests",
        within=Range("1 to 1048576", lambda count: 1 <= count <= 2**20),
    )
    max_num_batched_tokens: int = option(
        2048,
        "Most tokens in one step.",
        details="Those of prompts and of decodes count together.",
        unit="tokens",
        within=_COUNT,
    )
    max_mixed_tokens: int | None = option(
        None,
        "Most tokens in a step of prompts beside decodes.",
        details="A long prompt would hold the decodes up. On a GPU a Mixture of Experts gets 512 "
        "rows per expert if that is more; with experts in host memory, or with `--rotation-s`, it "
        "is all of `--max-num-batched-tokens` there. A step takes fewer where they would add more "
        "than about 0.25 s to it.",
        unit="tokens",
        within=_COUNT,
        if_none="256 on a CPU, 1024 on a GPU, more there for a Mixture of Experts or with "
        "--rotation-s; in any case about what takes 0.25 s",
    )
    max_model_len: int | None = option(
        None,
        "Longest context in tokens.",
        details="The hot tier must hold it: the model's own is cut to what it holds.",
        unit="tokens",
        within=Range("2 or more", lambda count: count >= 2),
        if_none="the model's own",
    )
    rotation_s: float | None = option(
        None,
        "Seconds after which requests give way to those without a first token; needs a host tier.",
        details="A request that has waited this long for its first token takes the place of one "
        "that has run this long, whose KV waits in the host tier. Each user sees a first token "
        "sooner and the last one later. It happens only while the host tier has room for all KV "
        "of the request that gives way.",
        unit="seconds",
        within=_SECONDS,
        if_none="first come, first served",
    )
    fetch_policy: Literal["auto", "fetch", "recompute"] = option(
        "auto", "How blocks in a slower tier come back; auto decides by cost."
    )
    disk_read_deadline_s: float = option(
        5.0,
        "Seconds after which a read from disk, of KV or of an expert, counts as failed.",
        unit="seconds",
        within=_SECONDS,
        flags=(),
    )
    disk_write_queue_s: float = option(
        2.0,
        "Seconds that a block waits at most for its write to disk.",
        unit="seconds",
        within=_SECONDS,
        flags=(),
    )
    json_max_digits: int = option(
        20,
        "Most digits in each part of a number of structured output; 0 is no bound.",
        details="The parts are the integer part and the fraction. This bound and the three below "
        "hold where the JSON schema leaves another way, and give way to larger ones that it names.",
        unit="digits",
        within=Range("0 (no bound) or more", lambda count: count >= 0),
    )
    json_max_string: int | None = option(
        None,
        "Most characters in a string of structured output.",
        details="The string ends with the token that reaches it.",
        unit="characters",
        within=_COUNT,
        if_none="no bound",
    )
    json_max_items: int | None = option(
        None,
        "Most items in an array of structured output.",
        unit="items",
        within=_COUNT,
        if_none="no bound",
    )
    json_max_depth: int | None = option(
        None,
        "Most levels of nesting in structured output.",
        unit="levels",
        within=_COUNT,
        if_none="no bound",
    )
    eager: bool = option(
        False,
        "On a GPU, do not compile the model: slower, but starts sooner.",
        details="There are no CUDA graphs then either.",
    )
    threads: int | None = option(
        None,
        "CPU threads that compute.",
        details="It is torch's own number if that is less, and holds for the process.",
        unit="threads",
        within=_COUNT,
        if_none="as many as affinity and a container's quota allow",
    )
    prefix_caching: bool = option(True, "Find known prompt beginnings instead of computing them.")
    seed: int = option(0, "For requests that sample and bring no seed.", flags=())

    def __post_init__(self) -> None:
        for name, each in options_of(EngineConfig).items():
            value = getattr(self, name)
            taken = each.taken(value)
            if taken is not value:
                object.__setattr__(self, name, taken)
        for rule in _RULES:
            if rule.is_broken(self):
                raise ConfigError(rule.says.format(c=self))

    @property
    def buffers_experts(self) -> bool:
        """Whether experts are bounded on the device, and the others kept in host memory."""
        return self.expert_slots is not None or self.expert_gib is not None

    @property
    def splits_memory(self) -> bool:
        """Whether a budget is for KV and experts together, where the model has some."""
        has_budget = self.hot_gib is not None or self.total_gib is not None
        return has_budget and not self.buffers_experts

    def changed(self, names: Iterable[str]) -> list[str]:
        """Which of these options have another value than their default."""
        known = options_of(EngineConfig)
        return [name for name in names if getattr(self, name) != known[name].default]


@dataclass(frozen=True, slots=True)
class _Rule:
    """Options that do not go together.

    Attributes:
        says: what is wrong and what to do, with `{c.name}` for an option's value.
    """

    is_broken: Callable[[EngineConfig], Any]
    says: str


def _heeded(
    names: Iterable[str], is_heeded: Callable[[EngineConfig], bool], why: str
) -> list[_Rule]:
    """A rule for each of these: it does nothing unless `is_heeded`."""

    def is_idle(name: str) -> Callable[[EngineConfig], bool]:
        return lambda c: bool(c.changed([name])) and not is_heeded(c)

    return [
        _Rule(is_idle(name), f"{name} is {{c.{name}!r}}, which does nothing {why}")
        for name in names
    ]


# In this order: the first that is broken is told. `engine/memory_split.py` and `experts/` refuse
# what only the model tells.
_RULES: tuple[_Rule, ...] = (
    _Rule(
        lambda c: c.expert_slots == 0 and c.expert_plan != "stream",
        f"expert_slots is {{c.expert_slots}}; expected {_SLOTS_TEXT}",
    ),
    _Rule(
        lambda c: c.rotation_s is not None and c.host_gib == 0,
        "rotation_s is {c.rotation_s} but host_gib is 0; give the host tier a size for the KV of "
        "those that wait, or leave rotation_s out",
    ),
    _Rule(
        lambda c: c.hot_gib is not None and c.total_gib is not None,
        "hot_gib is {c.hot_gib} and total_gib is {c.total_gib}; give one of them",
    ),
    _Rule(
        lambda c: c.expert_slots is not None and c.expert_gib is not None,
        "expert_slots is {c.expert_slots} and expert_gib is {c.expert_gib}; give one of them",
    ),
    *_heeded(
        HOST_EXPERT_OPTIONS,
        lambda c: c.buffers_experts or c.splits_memory,
        "while all experts are on the device; give expert_slots, expert_gib, hot_gib or "
        "total_gib, or leave it out",
    ),
    _Rule(
        lambda c: c.expert_disk_path is not None and c.expert_host_gib is None,
        "expert_disk_path is '{c.expert_disk_path}', but host memory for experts has no bound; "
        "give expert_host_gib, or leave it out",
    ),
    _Rule(
        lambda c: c.expert_plan == "stream" and c.expert_prefetch,
        "expert_prefetch is {c.expert_prefetch}, but the plan stream brings all experts ahead of "
        "their layer; leave one of them out",
    ),
    *_heeded(
        SPLIT_OPTIONS,
        lambda c: c.splits_memory,
        "without memory to split between KV and experts; give hot_gib or total_gib and neither "
        "expert_slots nor expert_gib, or leave it out",
    ),
    _Rule(
        lambda c: c.move_split and c.expert_plan == "stream",
        f"move_split is given, but expert_plan stream {_FIXED_TEXT}",
    ),
    _Rule(
        lambda c: c.move_split and c.expert_cpu != "off",
        f"move_split is given, but expert_cpu {{c.expert_cpu}} {_FIXED_TEXT}",
    ),
    _Rule(
        lambda c: c.expert_plan == "stream" and c.changed(["expert_eviction"]),
        "expert_eviction is {c.expert_eviction!r}, but the plan stream evicts nothing; leave one "
        "of them out",
    ),
    _Rule(
        lambda c: c.disk_path is not None and c.disk_gib == 0,
        "disk_path is '{c.disk_path}' but disk_gib is 0; give disk_gib a size, or leave disk_path "
        "out",
    ),
)
