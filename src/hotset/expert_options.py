"""The options of an engine on experts: one group for each way to keep them.

Imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hotset.eviction import POLICIES
from hotset.option_fields import COUNT, SIZE, Bounds, Group, option

Plan = Literal["auto", "cache", "stream"]
ColdDType = Literal["auto", "fp8", "int4"]


@dataclass(frozen=True, slots=True)
class AllResident(Group):
    """All experts stay on the device; so it is with models that have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedExperts(Group):
    """How experts that are not on the device are kept, and how they come there."""

    expert_host_gib: float | None = option(
        None,
        "Host memory for experts, in GiB, the others on disk.",
        bounds=SIZE,
        otherwise="what they take",
        keeps_answers=True,
    )
    expert_disk_path: Path | None = option(
        None,
        "Folder for experts on disk.",
        otherwise="in the platform's cache folder",
        keeps_answers=True,
    )
    expert_plan: Plan = option(
        "auto",
        "How other experts come: those a step needs, or all, ahead of it; auto by its tokens.",
        more="`cache` copies those that a step needs into slots, `stream` all of them while the "
        "layer before computes; `auto` is the way that is expected to take less time for the "
        "tokens of the step. With experts on disk it is `cache`.",
        keeps_answers=True,
    )
    expert_cpu: Literal["off", "auto", "on"] = option(
        "off",
        "On a GPU, have the CPU compute experts in host memory in small steps; auto where it is "
        "faster. Rounds otherwise than the GPU.",
        more="`auto` goes by what is measured at start. Output depends on what is resident then, "
        "as far as rounding goes.",
        keeps_answers=True,
    )
    expert_eviction: str = option(
        "lru", "Which expert makes room for another.", choices=tuple(POLICIES), keeps_answers=True
    )
    expert_cold_dtype: ColdDType = option(
        "auto",
        "Of experts in host memory; auto is their own, the others have fewer bytes to move and are "
        "not exact.",
        more="`fp8` and `int4` take about a half and a quarter of the bytes of bfloat16. All "
        "experts have the values that come back from there, so what is on the device does not "
        "change the output.",
    )
    expert_prefetch: int = option(
        0,
        "Experts of the next layer to copy while one computes, by its router's guess; 0 is none.",
        bounds=Bounds("0 (none) or more experts of a layer", 0),
        more="In steps that cache. It helps where the link would be idle: a wrong guess costs a "
        "copy.",
        keeps_answers=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSlots(HostedExperts):
    """Each layer keeps this number of experts on the device."""

    expert_slots: int = option(
        None,
        "Experts of a layer to keep beside the chip, the others in host memory.",
        bounds=Bounds("1 or more, or 0 with the expert_plan stream", 0),
        otherwise="all",
        keeps_answers=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBudget(HostedExperts):
    """Experts get this part of the device's memory."""

    expert_gib: float = option(
        None,
        "The same by size: memory for experts beside the chip, in GiB.",
        bounds=SIZE,
        keeps_answers=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMemory(HostedExperts):
    """KV and experts share `hot_gib`, or what `total_gib` leaves, as the cost model says."""

    target: Literal["throughput", "latency"] = option(
        "throughput",
        "What the split between KV and experts is best for.",
        more="`throughput` is the most tokens/s of users that queue for ever, `latency` the "
        "shortest step that all of them decode in.",
        keeps_answers=True,
    )
    expected_users: int | None = option(
        None,
        "Requests at once that the split is for.",
        bounds=COUNT,
        otherwise="max_num_seqs; 8 for latency",
        keeps_answers=True,
    )
    expected_prompt_tokens: int | None = option(
        None,
        "Their prompts, in tokens.",
        bounds=COUNT,
        otherwise="1024",
        more="Four fifths of a shorter longest context.",
        keeps_answers=True,
    )
    expected_output_tokens: int | None = option(
        None,
        "Their answers, in tokens.",
        bounds=COUNT,
        otherwise="256",
        more="A fifth of a shorter longest context.",
        keeps_answers=True,
    )
    move_split: bool = option(
        False,
        "Have the split between KV and experts follow the load while the engine runs.",
        keeps_answers=True,
    )


ExpertOptions = AllResident | ExpertSlots | ExpertBudget | SplitMemory
