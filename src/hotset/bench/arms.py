"""Arms: what each is, and the engine's options that make it so."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hotset.bench.workload import Work
from hotset.cgroups import available_host_bytes
from hotset.errors import ConfigError
from hotset.executor.probe import ModelLayout
from hotset.expert_options import AllResident, ExpertBudget, ExpertSlots, HostedExperts, SplitMemory
from hotset.experts.gating import unpack_experts
from hotset.experts.sizes import slot_bytes_of
from hotset.experts.weights import experts_layers
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import capacity_bytes_for
from hotset.options import OPTIONS, Options, own_options
from hotset.units import GIB

RESIDENT, EXPERTS, HOT_SET = "resident", "experts", "hot-set"
ARMS = ("hot", "host", "host+disk", RESIDENT, EXPERTS, HOT_SET)
_ALL_EXPERTS = (RESIDENT, HOT_SET)  # have all on the device, whatever the options say

# Where no size is given: host and disk tiers over contexts.
_HOST_PER_CONTEXTS = 1.1
_HOST_BESIDE_DISK = 0.5
_DISK_PER_CONTEXTS = 1.25
_LEAST_HOT_TOKENS = 320  # the engine takes no hot tier below 256
_LEAST_HOST_BLOCKS = 64


def order_of(arms: Sequence[str], repeat: int) -> list[str]:
    """Arms rotate from one round to the next, so that none is always first."""
    shift = repeat % len(arms)
    return [*arms[shift:], *arms[:shift]]


def parse_arms(text: str) -> list[str]:
    """The arms that a text names.

    Raises:
        ConfigError: there is no such arm, or one is named twice.
    """
    arms = [arm.strip() for arm in text.split(",") if arm.strip()]
    for arm in arms:
        if arm not in ARMS:
            raise ConfigError(
                f"arms is {text!r}; {arm!r} is unknown, expected some of {','.join(ARMS)}"
            )
    if not arms or len(set(arms)) != len(arms):
        raise ConfigError(f"arms is {text!r}; expected each of {','.join(ARMS)} once at most")
    return arms


def check_arms(arms: list[str], config: Options) -> None:
    """Raise ConfigError where an arm would not be what its name says."""
    if EXPERTS in arms and isinstance(config.experts, AllResident):
        raise ConfigError(
            f"the arm {EXPERTS} is for experts of which some are in host memory; give "
            "expert_slots, expert_gib, hot_gib or total_gib"
        )
    if HOT_SET in arms and not config.memory.host_gib:
        raise ConfigError(
            f"the arm {HOT_SET} has the tokens of hot requests in host memory; give host_gib"
        )
    others = [arm for arm in arms if arm not in _ALL_EXPERTS]
    reason = why_not_with_resident(config)
    if RESIDENT in arms and others and reason is not None:
        raise ConfigError(
            f"{reason}, so that {RESIDENT} cannot have them in one call with {','.join(others)}; "
            "give it a call of its own"
        )


def why_not_with_resident(config: Options) -> str | None:
    """What keeps the experts from being all on the device in the same call; None where nothing."""
    asked = config.experts
    if isinstance(asked, AllResident):
        return None
    if asked.expert_cold_dtype != "auto":
        return (
            f"expert_cold_dtype is {asked.expert_cold_dtype}, which rounds the only copy of the "
            "experts"
        )
    if asked.expert_host_gib is not None:
        return f"expert_host_gib is {asked.expert_host_gib}, which leaves experts on disk"
    return None


def needs_host_experts(arms: list[str], config: Options) -> bool:
    """Whether an arm may have experts in host memory, so that they are best loaded there."""
    is_bounded = isinstance(config.experts, HostedExperts)
    return is_bounded and any(arm not in _ALL_EXPERTS for arm in arms)


def with_all_resident(config: Options, model: PreTrainedModel) -> Options:
    """The options with room for all experts on the device, and `hot_gib` for KV alone.

    Raises:
        ConfigError: they do not fit.
    """
    layers = experts_layers(model)
    if isinstance(config.experts, AllResident) or not layers:
        return config
    if model.device.type == "cuda":
        hosted = [experts.hosted for experts in layers]
        away_bytes = sum(each.source.rows.num_bytes for each in hosted if each is not None)
        free_bytes, _ = torch.cuda.mem_get_info(model.device)
        if away_bytes > free_bytes:
            raise ConfigError(
                f"all experts take {away_bytes / 1e9:.1f} GB more than is there now and "
                f"{free_bytes / 1e9:.1f} GB are free on the device; leave the arm {RESIDENT} out"
            )
    ignored = ["expert_gib"]
    ignored += [one.name for group in (HostedExperts, SplitMemory) for one in own_options(group)]
    defaults = {name: OPTIONS[name].default for name in ignored}
    return config.but(expert_slots=layers[0].num_experts, **defaults)


def with_hot_tier(
    config: Options, work: Work, layout: ModelLayout, model: PreTrainedModel
) -> Options:
    """The options with a size for KV on the device, where they have none and the work wants one.

    It is for KV alone, and leaves experts out.
    """
    memory, per_hot = config.memory, work.contexts_per_hot
    if per_hot is None or memory.hot_gib is not None or memory.total_gib is not None:
        return config
    tokens = max(work.kv_tokens / per_hot, work.longest_context + 64, _LEAST_HOT_TOKENS)
    block_size = memory.block_size or layout.default_block_size
    blocks = -(-int(tokens) // block_size)
    hot_gib = (blocks + 0.5) * block_size * layout.bytes_per_token / GIB
    slots = slot_bytes_of(model, HostedExperts())
    if slots is None or isinstance(config.experts, ExpertSlots | ExpertBudget):
        return config.but(hot_gib=hot_gib)
    return config.but(hot_gib=hot_gib, expert_slots=slots.num_experts)


def options_of(
    arm: str,
    config: Options,
    work: Work,
    layout: ModelLayout,
    model: PreTrainedModel,
    stack: ExitStack,
) -> Options:
    """The engine's options for an arm; a disk tier starts empty, in a folder that `stack` removes.

    Undoes what the engine before did to the experts that keeps them from being moved.
    """
    if isinstance(config.experts, HostedExperts):
        unpack_experts(model)
    if arm in _ALL_EXPERTS:
        config = with_all_resident(config, model)
    if arm == HOT_SET:
        return config.but(disk_gib=0.0, disk_path=None)
    config = config.but(hot_tokens=None)  # requests can be hot in no other arm
    if arm in ("hot", RESIDENT, EXPERTS):
        return config.but(host_gib=0.0, disk_gib=0.0, disk_path=None)
    memory = config.memory
    block_size = memory.block_size or layout.default_block_size
    block_bytes = layout.bytes_per_token * block_size
    of_rank, num_ranks = slot_bytes_for(block_bytes), config.layout.spread.gpus
    slot_bytes = num_ranks * of_rank
    blocks = -(-work.kv_tokens // block_size)
    if work.prefixes and memory.hot_gib is not None:  # what pushes them out goes down too
        blocks += 2 * int(memory.hot_gib * GIB / block_bytes)
    host_gib = memory.host_gib
    if not host_gib:
        share = _HOST_PER_CONTEXTS if arm == "host" else _HOST_BESIDE_DISK
        wanted = min(blocks * share * slot_bytes, available_host_bytes() / 2)
        host_gib = max(_LEAST_HOST_BLOCKS * slot_bytes, wanted) / GIB
    if arm == "host":
        return config.but(host_gib=host_gib, disk_gib=0.0, disk_path=None)
    num_payloads = int(blocks * _DISK_PER_CONTEXTS) + 1
    disk_gib = memory.disk_gib or num_ranks * (capacity_bytes_for(num_payloads, of_rank) + 1) / GIB
    parent = memory.disk_path
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=parent))
    return config.but(host_gib=host_gib, disk_gib=disk_gib, disk_path=Path(folder))
