"""Configuration: one frozen dataclass, read once; the command line takes its defaults from it.

Imports no torch.
"""

import functools
import math
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hotset.errors import ConfigError

GIB = 2**30

DType = Literal["auto", "float32", "bfloat16", "float16", "fp8"]
KVDType = Literal["auto", "fp8"]

# What says how experts in host memory come, and its defaults.
EXPERT_OPTIONS = {
    "expert_plan": "auto",
    "expert_eviction": "lru",
    "expert_cold_dtype": "auto",
    "expert_prefetch": 0,
    "expert_host_gib": None,
    "expert_cpu": "off",
}
# What there is at least one of, if a number is given.
_COUNTS = (
    "expected_users",
    "expected_prompt_tokens",
    "expected_output_tokens",
    "max_num_batched_tokens",
    "max_mixed_tokens",
    "json_max_string",
    "json_max_items",
    "json_max_depth",
    "threads",
)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine may use, and how it runs.

    Attributes:
        model: a folder, a GGUF file, a hub id, or None for the small default model.
        device: `auto`, `cpu` or `cuda`.
        dtype: of weights and KV; `auto` is float32 on the CPU and the checkpoint's on a GPU. `fp8`
            is bfloat16 but for the weights of linear layers, which are 8-bit floats (e4m3) with a
            scale for each output: near half the bytes, and not exact.
        kv_dtype: of stored keys and values; `auto` is `dtype`, `fp8` is 8-bit floats (e4m3), with
            the scales of the checkpoint where it has some: half the bytes, and not exact.
        hot_gib: KV memory on the device, in GiB; None takes what is left beside the weights. For a
            Mixture-of-Experts model it is for KV and experts together, split by the cost model,
            unless `expert_slots` or `expert_gib` sizes the experts.
        total_gib: all memory on the device, in GiB: weights, experts, KV and the workspace of
            steps. Instead of `hot_gib`, and split likewise.
        target: what a split between KV and experts is best for: `throughput`, the most tokens/s of
            `expected_users` that queue for ever; or `latency`, the shortest step that all of them
            decode in.
        expected_users: requests that run at once, for the split; None is `max_num_seqs` for
            throughput and 8 for latency.
        expected_prompt_tokens: of a request, for the split; None is 1024, or four fifths of a
            shorter longest context.
        expected_output_tokens: likewise; None is 256, or the other fifth.
        move_split: whether the split follows the load while the engine runs.
        host_gib: host tier for KV, in GiB; 0 is none.
        disk_gib: disk tier for KV, in GiB; 0 is none.
        disk_path: folder of the disk tier; None is the platform's cache folder.
        expert_slots: experts of a Mixture-of-Experts model that each layer keeps on the device; the
            others are in host memory. None, and no `expert_gib`, is all.
        expert_gib: the same by size: device memory for all experts, in GiB.
        expert_host_gib: host memory for experts, in GiB: those beyond it are on disk. None is as
            much as they take.
        expert_disk_path: folder for experts on disk; None is in the platform's cache folder.
        expert_plan: how the others come: `cache` copies those that a step needs into slots,
            `stream` all of them while the layer before computes; `auto` is either, step by step:
            that which is expected to take less time for so many tokens. With experts on
            disk it is `cache`.
        expert_cpu: on a GPU, whether the CPU computes experts that are in host memory, in steps of
            few tokens: `off`, `auto` where it is faster by what is measured at start, or `on` in
            all such steps. Their rounding is the CPU's then, so that output depends on what is
            resident as far as rounding goes.
        expert_eviction: which expert leaves a slot; see `experts.residency.SlotTable`.
        expert_cold_dtype: of experts in host memory; `auto` is their own. With `fp8` or `int4`,
            about a half or a quarter of the bytes of bfloat16, all experts have the values that
            come back from there, so what is on the device does not change the output; not exact.
            See `experts.narrow`.
        expert_prefetch: in steps of the plan `cache`, at most so many experts of the next layer are
            copied while a layer computes, chosen by the next layer's router for this layer's
            input; 0 is none. It helps where the link would be idle: a wrong guess costs a copy.
        block_size: tokens a KV block holds.
        max_num_seqs: most requests in one step.
        max_num_batched_tokens: token budget of one step, over prefill and decode.
        max_mixed_tokens: the same for a step that computes prompts beside decodes, which a long
            prompt would hold up; None is 256 on the CPU and 1024 on a GPU. There a Mixture of
            Experts gets 512 rows an expert if that is more. With experts in host memory, or with
            `rotation_s`, it is all of `max_num_batched_tokens` there. A step takes fewer where
            they would add more than about 0.25 s to it.
        max_model_len: longest context; None is the model's own, as far as the hot tier holds it.
        rotation_s: None serves first come, first served. Otherwise each request that has waited
            for its first token for so long takes the place of one that has run for so long, whose
            KV waits in the host tier: every user sees a first token sooner, and the last one
            later. Takes place only while the host tier has room for all of it.
        prefix_caching: find leading blocks by hash instead of computing them again.
        fetch_policy: `auto` decides between fetch and recompute by cost; the others force one.
        disk_read_deadline_s: a read from disk, of KV or of an expert, that takes longer counts as
            failed.
        disk_write_queue_s: a block waits at most this long for its write to disk.
        json_max_digits: most digits of a number's integer part and of its fraction, each, where an
            output follows a JSON schema; 0 is no bound. These bounds hold where the schema leaves
            another way, and give way to larger ones that it names itself.
        json_max_string: most characters of a string there, to the end of the token that reaches
            it; None is no bound.
        json_max_items: most items of an array there; None is no bound.
        json_max_depth: most arrays and objects within each other there; None is no bound.
        eager: on a GPU, run without `torch.compile` and CUDA graphs: slower, but starts sooner.
        threads: of the CPU, that compute; None is torch's own number, or as many CPUs as affinity
            and the quota of a container allow if that is less. It holds for the process.
        seed: for requests that sample and bring no seed.
    """

    model: str | None = None
    device: str = "auto"
    dtype: DType = "auto"
    kv_dtype: KVDType = "auto"
    hot_gib: float | None = None
    total_gib: float | None = None
    target: Literal["throughput", "latency"] = "throughput"
    expected_users: int | None = None
    expected_prompt_tokens: int | None = None
    expected_output_tokens: int | None = None
    move_split: bool = False
    host_gib: float = 0.0
    disk_gib: float = 0.0
    disk_path: Path | None = None
    expert_slots: int | None = None
    expert_gib: float | None = None
    expert_host_gib: float | None = None
    expert_disk_path: Path | None = None
    expert_plan: Literal["auto", "cache", "stream"] = "auto"
    expert_cpu: Literal["off", "auto", "on"] = "off"
    expert_eviction: Literal["least-stale", "lru", "lfu", "lifo"] = "lru"
    expert_cold_dtype: Literal["auto", "fp8", "int4"] = "auto"
    expert_prefetch: int = 0
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_mixed_tokens: int | None = None
    max_model_len: int | None = None
    rotation_s: float | None = None
    prefix_caching: bool = True
    fetch_policy: Literal["auto", "fetch", "recompute"] = "auto"
    disk_read_deadline_s: float = 5.0
    disk_write_queue_s: float = 2.0
    json_max_digits: int = 20
    json_max_string: int | None = None
    json_max_items: int | None = None
    json_max_depth: int | None = None
    eager: bool = False
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        if self.rotation_s is not None and self.host_gib == 0:
            raise ConfigError(
                f"rotation_s is {self.rotation_s} but host_gib is 0; give the host tier a size for "
                "the KV of those that wait, or leave rotation_s out"
            )
        if self.hot_gib is not None and self.total_gib is not None:
            raise ConfigError(
                f"hot_gib is {self.hot_gib} and total_gib is {self.total_gib}; give one of them"
            )
        self._check_experts()
        if self.disk_path is not None and self.disk_gib == 0:
            raise ConfigError(
                f"disk_path is {str(self.disk_path)!r} but disk_gib is 0; "
                "give disk_gib a size, or leave disk_path out"
            )

    @property
    def buffers_experts(self) -> bool:
        """Whether experts are bounded on the device, and the others kept in host memory."""
        return self.expert_slots is not None or self.expert_gib is not None

    @property
    def splits_memory(self) -> bool:
        """Whether a budget is for KV and experts together, where the model has some."""
        has_budget = self.hot_gib is not None or self.total_gib is not None
        return has_budget and not self.buffers_experts

    @property
    def split_options(self) -> list[str]:
        """The options given that only a split between KV and experts heeds."""
        names = (
            "target",
            "expected_users",
            "expected_prompt_tokens",
            "expected_output_tokens",
            "move_split",
        )
        return [name for name in names if getattr(self, name) not in (None, "throughput", False)]

    def _check_types(self) -> None:
        """Refuse values of other types than their field's; a path may be a text, and likewise."""
        for name, (kind, is_optional) in _field_kinds().items():
            value = getattr(self, name)
            if value is None and is_optional:
                continue
            taken, expected = _taken_as(value, kind)
            if taken is None:
                expected += " or None" if is_optional else ""
                raise ConfigError(f"{name} is {value!r}; expected {expected}")
            if taken is not value:
                object.__setattr__(self, name, taken)

    def _check_ranges(self) -> None:
        def check(ok: Callable[[Any], bool], expected: str, *names: str) -> None:
            for name in names:
                value = getattr(self, name)
                if value is not None and not ok(value):
                    raise ConfigError(f"{name} is {value!r}; expected {expected}")

        sizes = ("hot_gib", "total_gib", "expert_gib", "expert_host_gib")
        check(lambda size: 0 < size < math.inf, "a size above 0 GiB", *sizes)
        tiers = ("host_gib", "disk_gib")
        check(lambda size: 0 <= size < math.inf, "0 (none) or a size in GiB", *tiers)
        fewest = 0 if self.expert_plan == "stream" else 1
        wanted = "1 or more, or 0 with the expert_plan stream"
        check(lambda count: count >= fewest, wanted, "expert_slots")
        wanted = "0 (none) or more experts of a layer"
        check(lambda count: count >= 0, wanted, "expert_prefetch")
        check(lambda count: 1 <= count <= 1024, "1 to 1024 tokens", "block_size")
        check(lambda count: count >= 2, "2 or more", "max_model_len")
        check(lambda count: 1 <= count <= 2**20, "1 to 1048576", "max_num_seqs")
        check(lambda count: count >= 0, "0 (no bound) or more", "json_max_digits")
        check(lambda count: count >= 1, "1 or more", *_COUNTS)
        seconds = ("rotation_s", "disk_read_deadline_s", "disk_write_queue_s")
        check(lambda length: length > 0, "above 0 seconds", *seconds)

    def _check_experts(self) -> None:
        if self.expert_slots is not None and self.expert_gib is not None:
            raise ConfigError(
                f"expert_slots is {self.expert_slots} and expert_gib is {self.expert_gib}; "
                "give one of them"
            )
        for name, default in EXPERT_OPTIONS.items():
            value = getattr(self, name)
            if value != default and not (self.buffers_experts or self.splits_memory):
                raise ConfigError(
                    f"{name} is {value!r}, which does nothing while all experts are on the device; "
                    "give expert_slots, expert_gib, hot_gib or total_gib, or leave it out"
                )
        if self.expert_disk_path is not None and self.expert_host_gib is None:
            raise ConfigError(
                f"expert_disk_path is {str(self.expert_disk_path)!r}, but host memory for experts "
                "has no bound; give expert_host_gib, or leave it out"
            )
        if self.expert_plan == "stream" and self.expert_prefetch:
            raise ConfigError(
                f"expert_prefetch is {self.expert_prefetch}, but the plan stream brings all "
                "experts ahead of their layer; leave one of them out"
            )
        if self.split_options and not self.splits_memory:
            name = self.split_options[0]
            raise ConfigError(
                f"{name} is {getattr(self, name)!r}, which does nothing without memory to split "
                "between KV and experts; give hot_gib or total_gib and neither expert_slots nor "
                "expert_gib, or leave it out"
            )
        if self.move_split and (self.expert_plan == "stream" or self.expert_cpu != "off"):
            name = "expert_plan" if self.expert_plan == "stream" else "expert_cpu"
            raise ConfigError(
                f"move_split is given, but {name} {getattr(self, name)} needs the same number of "
                "resident experts throughout; leave one of them out"
            )
        default = EXPERT_OPTIONS["expert_eviction"]
        if self.expert_plan == "stream" and self.expert_eviction != default:
            raise ConfigError(
                f"expert_eviction is {self.expert_eviction!r}, but the plan stream evicts nothing; "
                "leave one of them out"
            )


@functools.cache
def _field_kinds() -> dict[str, tuple[Any, bool]]:
    """By field of `EngineConfig`: what it holds, and whether it may be None."""
    kinds = {}
    for name, hint in get_type_hints(EngineConfig).items():
        members = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
        (kind,) = (member for member in members if member is not NoneType)
        kinds[name] = (kind, NoneType in members)
    return kinds


def _taken_as(value: Any, kind: Any) -> tuple[Any, str]:
    """A value as what its field holds, None where it cannot be that; and what is expected.

    Numbers of other libraries become Python's; True and False are no numbers.
    """
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        taken = value if isinstance(value, str) and value in choices else None
        return taken, f"{', '.join(choices[:-1])} or {choices[-1]}"
    if kind is bool:
        return value if isinstance(value, bool) else None, "True or False"
    if kind is Path:
        return Path(value) if isinstance(value, str | os.PathLike) else None, "a path"
    if kind is str:
        return os.fspath(value) if isinstance(value, str | os.PathLike) else None, "a text"
    is_number = not isinstance(value, bool)
    if kind is int:
        is_number = is_number and isinstance(value, numbers.Integral)
        return int(value) if is_number else None, "a whole number"
    assert kind is float
    is_number = is_number and isinstance(value, numbers.Real)
    return (value if isinstance(value, int) else float(value)) if is_number else None, "a number"
