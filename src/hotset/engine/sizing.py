"""What each part of an engine gets of the memory, before any of it is taken. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from hotset.cost.expert_sizes import ExpertSizes, asked_sizes
from hotset.cost.slot_bytes import SlotBytes
from hotset.cost.tuning import TUNINGS
from hotset.engine.memory_split import MovingSplit, Rated, SolvedSplit, split_memory
from hotset.errors import ConfigError
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import capacity_bytes_for, payloads_within
from hotset.option_groups import (
    ExpertBudget,
    ExpertSlots,
    HostedExperts,
    ScheduleOptions,
    SplitMemory,
)
from hotset.options import Options, own_options
from hotset.units import GIB, gib_text, round_up_gib

# Host slots a disk tier needs below a device without a host tier, to pass payloads through.
_STAGING_SLOTS = 64
_REPORTED_CONTEXTS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model that is loaded on its device, in numbers.

    Attributes:
        device: `cpu` or `cuda`.
        max_len: longest context the model was made for.
        kv_bytes_per_token: over all layers.
        block_size: tokens of a KV block.
        workspace_bytes: kept free on the device for steps.
        dense_bytes: of weights that are not experts'.
        expert_bytes: of experts that are weights, wherever they are; 0 of those that an engine has
            moved to host memory or disk.
        device_expert_bytes: the part of these that is on the device.
        num_experts: of a layer; 0 for a dense model.
        top_k: experts that a token is routed to.
        slots: what slots of its experts take, for the plan asked for; None where they cannot be
            hosted.
        why_not_hosted: why; empty where they can.
        rated: how fast it runs; None where no split depends on it.
    """

    device: str
    max_len: int
    kv_bytes_per_token: int
    block_size: int
    workspace_bytes: int
    dense_bytes: int
    expert_bytes: int = 0
    device_expert_bytes: int = 0
    num_experts: int = 0
    top_k: int = 1
    slots: SlotBytes | None = None
    why_not_hosted: str = "it is dense"
    rated: Rated | None = None


@dataclass(frozen=True, slots=True)
class FreeBytes:
    """Memory that is free with the model loaded; on a CPU both are the same memory."""

    device: int
    host: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What goes where. Made by `solve_sizes`.

    Attributes:
        weights_bytes: without experts that are in slots.
        workspace_bytes: an estimate of what the largest step takes beside weights and KV.
        num_blocks: KV blocks that the device has addresses for.
        first_block: the first of them that no expert slot has the memory of.
        host_slots: payloads in host memory; more than `host_gib` asks for only to stage a disk.
        disk_bytes: size bound of the disk tier.
        max_model_len: longest context one request can have.
        max_mixed_tokens: most tokens of a step of prompts beside decodes.
        experts: where they are; None where they stay as they were loaded.
        moving: how the split between experts and KV moves; None where it stays.
        split_report: what to say of the split at start; empty where there is none.
    """

    weights_bytes: int
    workspace_bytes: int
    block_bytes: int
    block_size: int
    num_blocks: int
    first_block: int
    host_slots: int
    disk_bytes: int
    max_model_len: int
    max_mixed_tokens: int
    experts: ExpertSizes | None = None
    moving: MovingSplit | None = None
    split_report: str = ""

    @property
    def device_blocks(self) -> int:
        """KV blocks in the hot tier."""
        return self.num_blocks - self.first_block

    @property
    def expert_bytes(self) -> int:
        """Of slots and staging buffers of experts that are in host memory."""
        is_hosted = self.experts is not None and not self.experts.are_resident
        return self.experts.device_bytes if self.experts is not None and is_hosted else 0

    def report(self, *, device: str, disk_path: Path | None) -> str:
        """The table shown at start."""
        slot_bytes = slot_bytes_for(self.block_bytes)
        disk_slots = payloads_within(self.disk_bytes, slot_bytes)
        rows: list[tuple[str, str, int, int]] = [
            ("weights", device, self.weights_bytes, 0),
            ("workspace", device, self.workspace_bytes, 0),
            ("KV, hot tier", device, self.device_blocks * self.block_bytes, self.device_blocks),
        ]
        if self.expert_bytes:
            rows.insert(1, ("expert slots", device, self.expert_bytes, 0))
        if self.host_slots:
            rows.append(("KV, host tier", "host", self.host_slots * slot_bytes, self.host_slots))
        if self.disk_bytes:
            rows.append(("KV, disk tier", str(disk_path), disk_slots * slot_bytes, disk_slots))
        lines = [f"{'what':<16}{'GiB':>9}{'blocks':>10}{'tokens':>12}  where"]
        for what, where, num_bytes, blocks in rows:
            counts = f"{blocks:>10}{blocks * self.block_size:>12}" if blocks else " " * 22
            lines.append(f"{what:<16}{num_bytes / GIB:>9.3f}{counts}  {where}")
        users = []
        # Payloads in host memory are on the disk too.
        total_blocks = self.device_blocks + max(self.host_slots, disk_slots)
        for context in (*_REPORTED_CONTEXTS, self.max_model_len):
            if context <= self.max_model_len:
                blocks = -(-context // self.block_size)
                users.append(
                    f"{context} tokens: {self.device_blocks // blocks} hot"
                    + (f", {total_blocks // blocks} in all tiers" if self.host_slots else "")
                )
        lines.append("users of a context of " + "; ".join(dict.fromkeys(users)))
        return "\n".join(lines)


def solve_sizes(options: Options, model: ModelSizes, free: FreeBytes) -> Sizes:
    """Turn what was asked into the size of each part.

    Args:
        options: the user's.
        model: loaded; its experts may still be elsewhere than they are to be.
        free: with the model loaded.

    Raises:
        ConfigError: a size that cannot work, with the smallest or largest one that can; or an
            option without effect for this model.
    """
    memory, asked = options.memory, options.experts
    experts = None
    if isinstance(asked, HostedExperts):
        experts = size_experts(asked, model.slots, model.why_not_hosted, device=model.device)
    hot_bytes = _hot_bytes(options, model, experts)
    split = None
    if isinstance(asked, SplitMemory) and model.slots is not None:
        assert hot_bytes is not None
        split = _split(options, asked, model, hot_bytes)
        hot_bytes, experts = split.kv_bytes, split.experts
    beside = _beside_experts(model, free, experts)
    kv_bytes = _kv_bytes(options, model, hot_bytes, beside.device)
    _check_fits(options, model, experts, kv_bytes, beside.device)
    block_bytes = model.block_size * model.kv_bytes_per_token
    num_blocks = _num_blocks(options, model, kv_bytes)
    host_slots = _host_slots(options, block_bytes)
    free_host = beside.host - (kv_bytes if model.device == "cpu" else 0)
    if host_slots * slot_bytes_for(block_bytes) > free_host:
        raise ConfigError(
            f"the host tier would take {host_slots * slot_bytes_for(block_bytes) / GIB:.3f} GiB "
            f"but {max(0, free_host) / GIB:.3f} GiB of host memory are free; give less host_gib"
        )
    max_len = min(_wanted_len(options, model), num_blocks * model.block_size)
    first_block, moving = 0, None if split is None else split.moving
    if moving is not None and experts is not None:
        region = moving.region
        num_blocks, first_block = region.num_blocks, region.first_block(experts.num_slots)
        max_len = min(max_len, region.num_kv_blocks(region.most_slots) * model.block_size)
    return Sizes(
        weights_bytes=_weights_bytes(model, experts),
        workspace_bytes=model.workspace_bytes,
        block_bytes=block_bytes,
        block_size=model.block_size,
        num_blocks=num_blocks,
        first_block=first_block,
        host_slots=host_slots,
        disk_bytes=int(memory.disk_gib * GIB),
        max_model_len=max_len,
        max_mixed_tokens=_mixed_tokens(
            options.schedule, model, is_hosted=experts is not None and not experts.are_resident
        ),
        experts=experts,
        moving=moving,
        split_report="" if split is None else split.report,
    )


def size_experts(
    asked: HostedExperts, slots: SlotBytes | None, why_not: str, *, device: str
) -> ExpertSizes | None:
    """Refuse options of experts that a model cannot follow; needs none of its weights.

    Args:
        asked: by the user.
        slots: of the model's experts; None where they cannot be hosted.
        why_not: why.
        device: `cpu` or `cuda`.

    Returns:
        What experts get, where the user gave them a size of their own.

    Raises:
        ConfigError: there are no such experts, or others than asked for.
    """
    if isinstance(asked, ExpertSlots | ExpertBudget):
        if slots is None:
            asked_for = "expert_slots" if isinstance(asked, ExpertSlots) else "expert_gib"
            raise ConfigError(
                f"{asked_for} is {getattr(asked, asked_for)}, but {why_not}; leave {asked_for} out"
            )
        return asked_sizes(asked, slots, device=device)
    if slots is None:
        for one in (*own_options(SplitMemory), *own_options(HostedExperts)):
            if (value := getattr(asked, one.name)) != one.default:
                raise ConfigError(f"{one.name} is {value!r}, but {why_not}; leave {one.name} out")
    return None


def _hot_bytes(options: Options, model: ModelSizes, experts: ExpertSizes | None) -> int | None:
    """What the user gives to KV, and to experts where these share it; None for what is left."""
    memory, asked = options.memory, options.experts
    if memory.total_gib is None:
        return None if memory.hot_gib is None else int(memory.hot_gib * GIB)
    taken = model.dense_bytes + model.workspace_bytes
    if model.slots is None:
        taken += model.expert_bytes  # in its own way, so they all stay
    elif isinstance(asked, ExpertBudget):
        taken += int(asked.expert_gib * GIB)
    elif experts is not None:
        taken += experts.slots(experts.num_slots)
    hot_bytes = int(memory.total_gib * GIB) - taken
    if hot_bytes <= 0:
        raise ConfigError(
            f"total_gib is {memory.total_gib}, but what is not split takes {gib_text(taken)}: "
            f"weights without experts {gib_text(model.dense_bytes)}, workspace "
            f"{gib_text(model.workspace_bytes)}; give more"
        )
    return hot_bytes


def _split(options: Options, asked: SplitMemory, model: ModelSizes, hot_bytes: int) -> SolvedSplit:
    assert model.slots is not None and model.rated is not None
    return split_memory(
        options,
        asked,
        model.slots,
        model.rated,
        hot_bytes=hot_bytes,
        kv_block_bytes=model.block_size * model.kv_bytes_per_token,
        block_size=model.block_size,
        fewest_blocks=_fewest_blocks(options, model),
        model_max_len=model.max_len,
        max_step_tokens=_mixed_tokens(options.schedule, model, is_hosted=True),
        device=model.device,
    )


def _beside_experts(model: ModelSizes, free: FreeBytes, experts: ExpertSizes | None) -> FreeBytes:
    """What is free once experts are where they are to be, from where they were loaded."""
    if experts is None:
        return free
    device = free.device + model.device_expert_bytes - experts.device_bytes
    # The host copy is made of weights; an engine before may have made it.
    host = free.host + model.expert_bytes - model.device_expert_bytes
    if model.expert_bytes:
        host -= experts.host_bytes
    if model.device == "cpu":
        if not model.expert_bytes and experts.are_resident:
            return free  # the host copy becomes the weights
        one = device + host - free.host
        return FreeBytes(one, one)
    return FreeBytes(device, host)


def _kv_bytes(options: Options, model: ModelSizes, hot_bytes: int | None, free_bytes: int) -> int:
    """What KV gets of the device: as asked, or a share of what is free."""
    schedule = options.schedule
    if model.workspace_bytes >= free_bytes:
        raise ConfigError(
            f"a step of {schedule.max_num_batched_tokens} tokens and {schedule.max_num_seqs} "
            f"requests may take {model.workspace_bytes / GIB:.3f} GiB beside weights and KV, and "
            f"{max(0, free_bytes) / GIB:.3f} GiB are free on the {model.device}; give less "
            "max_num_batched_tokens or max_num_seqs, or a smaller model"
        )
    if hot_bytes is not None:
        return hot_bytes
    block_bytes = model.block_size * model.kv_bytes_per_token
    most_blocks = -(-_wanted_len(options, model) // model.block_size)
    share = (free_bytes - model.workspace_bytes) * TUNINGS[model.device].memory_share
    return min(int(share), schedule.max_num_seqs * most_blocks * block_bytes)


def _check_fits(
    options: Options,
    model: ModelSizes,
    experts: ExpertSizes | None,
    kv_bytes: int,
    free_bytes: int,
) -> None:
    """Raise ConfigError where there is less memory on the device than KV is to have."""
    free_bytes -= model.workspace_bytes
    if kv_bytes <= free_bytes:
        return
    workspace = f"workspace ({gib_text(model.workspace_bytes)})"
    expert_bytes = 0 if experts is None else experts.device_bytes
    if expert_bytes and isinstance(options.experts, SplitMemory):
        free = gib_text(max(0, free_bytes + expert_bytes), up=False)
        raise ConfigError(
            f"{gib_text(kv_bytes + expert_bytes)} for KV and experts are more than the {free} free "
            f"on the {model.device} beside weights without experts ({gib_text(model.dense_bytes)}) "
            f"and {workspace}; give less"
        )
    name = "hot_gib" if options.memory.total_gib is None else "total_gib"
    weights_bytes = model.dense_bytes + (model.expert_bytes if experts is None else expert_bytes)
    raise ConfigError(
        f"{name} {getattr(options.memory, name)} asks for {gib_text(kv_bytes)} of KV, which is "
        f"more than the {gib_text(max(0, free_bytes), up=False)} free on the {model.device} beside "
        f"weights ({gib_text(weights_bytes)}) and {workspace}; give less, or leave {name} out"
    )


def _num_blocks(options: Options, model: ModelSizes, kv_bytes: int) -> int:
    block_bytes = model.block_size * model.kv_bytes_per_token
    needed = _fewest_blocks(options, model)
    if kv_bytes // block_bytes >= needed:
        return kv_bytes // block_bytes
    give = f"hot_gib {round_up_gib(needed * block_bytes)}"
    if (total_gib := options.memory.total_gib) is not None:
        give = f"total_gib {round_up_gib(total_gib * GIB + needed * block_bytes - kv_bytes)}"
    raise ConfigError(
        f"the hot tier of {kv_bytes / GIB:.6f} GiB holds {kv_bytes // block_bytes} KV blocks of "
        f"{block_bytes} bytes, but one request needs {needed}; give {give} or more"
    )


def _host_slots(options: Options, block_bytes: int) -> int:
    """Payloads in host memory, for the host tier and to stage a disk."""
    memory, slot_bytes = options.memory, slot_bytes_for(block_bytes)
    host_slots = int(memory.host_gib * GIB) // slot_bytes
    if memory.host_gib > 0 and host_slots < 1:
        raise ConfigError(
            f"host_gib {memory.host_gib} holds no KV block of {slot_bytes} bytes; give "
            f"{round_up_gib(slot_bytes)} or more, or 0 for no host tier"
        )
    if memory.disk_gib == 0:
        return host_slots
    if payloads_within(int(memory.disk_gib * GIB), slot_bytes) < 1:
        raise ConfigError(
            f"disk_gib {memory.disk_gib} holds no KV block of {slot_bytes} bytes beside its index; "
            f"give {round_up_gib(capacity_bytes_for(1, slot_bytes))} or more, or 0 for no disk tier"
        )
    return max(host_slots, _STAGING_SLOTS)


def _wanted_len(options: Options, model: ModelSizes) -> int:
    """The longest context asked for."""
    return min(options.schedule.max_model_len or model.max_len, model.max_len)


def _fewest_blocks(options: Options, model: ModelSizes) -> int:
    """KV blocks that one request needs: for the longest context asked for, else 256 tokens."""
    tokens = min(options.schedule.max_model_len or 256, model.max_len)
    return max(2, -(-tokens // model.block_size))


def _weights_bytes(model: ModelSizes, experts: ExpertSizes | None) -> int:
    if experts is None:
        return model.dense_bytes + model.expert_bytes
    return model.dense_bytes + (experts.device_bytes if experts.are_resident else 0)


def _mixed_tokens(schedule: ScheduleOptions, model: ModelSizes, *, is_hosted: bool) -> int:
    """Most tokens of a step of prompts beside decodes, with some experts in host memory or none."""
    if schedule.max_mixed_tokens is not None:
        return schedule.max_mixed_tokens
    tuning = TUNINGS[model.device]
    if model.device == "cpu":
        return tuning.mixed_tokens
    if schedule.rotation_s is not None:
        # First tokens are to come soon: the fewer steps the prompts take, the fewer decodes beside.
        return schedule.max_num_batched_tokens
    if not model.num_experts:
        return tuning.mixed_tokens
    if is_hosted:
        # A step with prompts brings nearly all missing experts over the link, which takes longer
        # than to compute any tokens: the more of them share it, the better, decodes too.
        return schedule.max_num_batched_tokens
    tokens = max(
        tuning.mixed_tokens, tuning.mixed_rows_per_expert * model.num_experts // model.top_k
    )
    return min(tokens, schedule.max_num_batched_tokens)
