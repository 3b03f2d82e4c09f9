"""Arms that differ in where the experts are: all on the device, or as the engine's options say."""

import torch
from transformers import PreTrainedModel

from hotset.engine.engine import Engine
from hotset.errors import ConfigError
from hotset.executor.probe import weights_bytes
from hotset.experts.gating import unpack_experts
from hotset.experts.weights import experts_layers
from hotset.option_groups import AllResident, HostedExperts, SplitMemory
from hotset.options import OPTIONS, Options, own_options

RESIDENT, EXPERTS = "resident", "experts"


def check_arms(arms: list[str], config: Options) -> None:
    """Raise ConfigError where an arm would not be what its name says."""
    if EXPERTS in arms and isinstance(config.experts, AllResident):
        raise ConfigError(
            f"the arm {EXPERTS} is for experts of which some are in host memory; give "
            "expert_slots, expert_gib, hot_gib or total_gib"
        )
    others = [arm for arm in arms if arm != RESIDENT]
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
    return is_bounded and any(arm != RESIDENT for arm in arms)


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


def make_ready(config: Options, model: PreTrainedModel) -> None:
    """Undo what the engine before did to the experts that keeps them from being moved."""
    if isinstance(config.experts, HostedExperts):
        unpack_experts(model)


def expert_sizes(engine: Engine, model: PreTrainedModel) -> dict[str, int]:
    """Bytes of experts, for results; empty for a model without."""
    layers = experts_layers(model)
    if not layers:
        return {}
    buffer = engine.experts
    if buffer is None:
        return {
            "experts_device_bytes": sum(weights_bytes(e.module) for e in layers),
            "experts_host_bytes": 0,
        }
    return {"experts_device_bytes": buffer.device_bytes, "experts_host_bytes": buffer.host_bytes}
