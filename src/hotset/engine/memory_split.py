"""From a budget for several things to a size for each: KV and experts, before they are made."""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from hotset.config import GIB, HOST_EXPERT_OPTIONS, SPLIT_OPTIONS, EngineConfig
from hotset.cost.expert_split import KVMemory, Split, Splitter, least_bytes
from hotset.cost.expert_steps import ExpertCost, Load, link_of
from hotset.cost.slot_bytes import SlotBytes
from hotset.engine.budget import fewest_blocks
from hotset.engine.model_shape import make_cost_model
from hotset.errors import ConfigError
from hotset.executor.probe import ModelLayout, weights_bytes
from hotset.experts.sizes import check_buffering, slot_bytes_of
from hotset.experts.weights import experts_bytes
from hotset.kernels.device import gpu_name, known_hardware, likely_hardware
from hotset.memory.region import SharedRegion
from hotset.model.loaded import LoadedModel

# What requests are like where the user does not say: a prompt and its answer, and how many of them
# there are where each step is to be short.
_PROMPT_TOKENS, _OUTPUT_TOKENS = 1024, 256
_FEW_USERS = 8


@dataclass(frozen=True, slots=True)
class Memory:
    """What there is and what is taken before KV and experts are.

    Attributes:
        free_bytes: on the device, with the model loaded.
        workspace_bytes: kept free for steps.
    """

    free_bytes: int
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class MovingSplit:
    """What a split needs to follow the load.

    Attributes:
        region: where its parts are.
        splitter: solves for another load.
        load: that it was solved for at start.
    """

    region: SharedRegion
    splitter: Splitter
    load: Load


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the options' sizes become for one model on one device.

    Attributes:
        hot_bytes: device memory for KV; None is what is left beside everything else.
        expert_slots: experts of each layer on the device; None where none are bounded, or where
            the options say it.
        report: what to say of it at start, empty for nothing.
        moving: how the split between KV and experts moves; None where it does not.
    """

    hot_bytes: int | None
    expert_slots: int | None = None
    report: str = ""
    moving: MovingSplit | None = None


def split_memory(
    config: EngineConfig,
    loaded: LoadedModel,
    layout: ModelLayout,
    memory: Memory,
    *,
    max_step_tokens: int,
) -> Sizes:
    """Turn `total_gib`, or `hot_gib` for KV and experts, into sizes for each.

    Args:
        config: the user's.
        loaded: its experts may be on the device or in host memory, packed or not.
        layout: what a token leaves in the cache.
        memory: on the device.
        max_step_tokens: most tokens of a step of prompts beside decodes, some experts on the host.

    Raises:
        ConfigError: a budget that is too small or too large, an option without effect, or a model
            with experts of which no times can be computed.
    """
    model = loaded.model
    slots = slot_bytes_of(model, config)
    if slots is None and config.splits_memory:
        _refuse_options_of_experts(config, type(model).__name__)
    dense_bytes = weights_bytes(model) - experts_bytes(model)
    hot_bytes = None if config.hot_gib is None else int(config.hot_gib * GIB)
    if config.total_gib is not None:
        taken = dense_bytes + memory.workspace_bytes
        if slots is None:
            taken += experts_bytes(model)  # in its own way, so they all stay
        elif config.buffers_experts:
            taken += _asked_expert_bytes(config, slots)
        hot_bytes = int(config.total_gib * GIB) - taken
        if hot_bytes <= 0:
            raise ConfigError(
                f"total_gib is {config.total_gib}, but what is not split takes {_gib(taken)}: "
                f"weights without experts {_gib(dense_bytes)}, workspace "
                f"{_gib(memory.workspace_bytes)}; give more"
            )
    if hot_bytes is None:
        return Sizes(None)
    free_bytes = memory.free_bytes - memory.workspace_bytes
    if slots is None or config.buffers_experts:
        return Sizes(hot_bytes)
    split, load, splitter = _solve(config, loaded, layout, slots, hot_bytes, max_step_tokens)
    moving = None
    if config.move_split:
        split, moving = _let_move(config, split, load, splitter, slots)
    # Experts that are on the device stay there or make room, but on a CPU their copy takes as much.
    if model.device.type != "cpu" or split.num_slots == slots.num_experts:
        free_bytes += experts_bytes(model, model.device)
    if hot_bytes > free_bytes:
        raise ConfigError(
            f"{_gib(hot_bytes)} for KV and experts are more than the {_gib(max(0, free_bytes))} "
            f"free on the {model.device.type} beside weights without experts "
            f"({_gib(dense_bytes)}) and workspace ({_gib(memory.workspace_bytes)}); give less"
        )
    said = _report(config, split, load, splitter.cost, moving)
    said += f"\n{_prediction(split, splitter.cost, model.device)}"
    return Sizes(split.kv_bytes, split.num_slots, said, moving)


def _solve(
    config: EngineConfig,
    loaded: LoadedModel,
    layout: ModelLayout,
    slots: SlotBytes,
    hot_bytes: int,
    max_step_tokens: int,
) -> tuple[Split, Load, Splitter]:
    max_len = min(config.max_model_len or loaded.max_model_len, loaded.max_model_len)
    load = expected_load(config, max_len)
    kv = KVMemory(config.block_size * layout.bytes_per_token, config.block_size, 0)
    fewest = max(fewest_blocks(config, loaded.max_model_len), kv.blocks_of(load.context))
    kv = replace(kv, fewest_blocks=fewest)
    fewest_slots = max(slots.fewest, config.expert_prefetch)
    cost = _expert_cost(loaded, layout, slots)
    splitter = Splitter(
        hot_bytes,
        cost,
        slots,
        kv,
        config.target,
        max_step_tokens,
        fewest_slots,
        slots.num_experts,
    )
    split = splitter.solve(load)
    if split is None:
        least = least_bytes(slots, kv, fewest_slots)
        name = "hot_gib" if config.total_gib is None else "total_gib"
        raise ConfigError(
            f"{name} {getattr(config, name)} leaves {_gib(hot_bytes)} for KV and experts, but the "
            f"fewest slots of the plan {slots.plan} and KV for one request of {load.context:.0f} "
            f"tokens take {_gib(least)}; give at least {_gib(least - hot_bytes)} more"
        )
    return split, load, splitter


def _let_move(
    config: EngineConfig, split: Split, load: Load, splitter: Splitter, slots: SlotBytes
) -> tuple[Split, MovingSplit]:
    """Bounds for a split that moves, around one that does not.

    Steps are recorded with the passes that the fewest slots need, so these are half of what is best
    at start. The most leave one context of `max_model_len` and one expert in host memory; where
    none is asked for, they are twice as many, as what they leave is the longest context then.

    Returns:
        the best split of these, whose staging buffers have room for the experts beside the fewest
        slots; and how it can move.
    """
    if split.num_slots == slots.num_experts:
        raise ConfigError(
            "move_split does nothing while all experts are on the device, as they are here; leave "
            "it out, or give less memory"
        )
    fewest = max(splitter.fewest_slots, split.num_slots // 2)
    most = slots.num_experts - 1
    if config.max_model_len is None:
        most = min(most, 2 * split.num_slots)
    slots = replace(slots, fewest_ever=fewest)
    block_bytes, fewest_blocks = splitter.kv.block_bytes, splitter.kv.fewest_blocks
    num_blocks = (splitter.total_bytes - slots(0)) // block_bytes
    unit_bytes = slots.num_layers * slots.payload_bytes
    region = SharedRegion(unit_bytes, block_bytes, num_blocks, fewest, most)
    while region.most_slots > fewest and region.num_kv_blocks(region.most_slots) < fewest_blocks:
        region = replace(region, most_slots=region.most_slots - 1)
    if region.most_slots <= fewest:
        raise ConfigError(
            f"move_split has no other split than {split.num_slots} slots to move to; leave it out, "
            "or give more memory"
        )
    splitter = replace(splitter, slots=slots, fewest_slots=fewest, most_slots=region.most_slots)
    best = splitter.solve(load)
    assert best is not None
    return best, MovingSplit(region, splitter, load)


def expected_load(config: EngineConfig, max_len: int) -> Load:
    """What the split is for: requests as the user expects them, or as they often are.

    Raises:
        ConfigError: those of the user are longer than the longest context.
    """
    output = config.expected_output_tokens
    if output is None:
        output = max(1, min(_OUTPUT_TOKENS, max_len // 5))
    prompt = config.expected_prompt_tokens
    if prompt is None:
        prompt = max(1, min(_PROMPT_TOKENS, max_len - output))
    if prompt + output > max_len:
        raise ConfigError(
            f"requests of {prompt} + {output} tokens are expected, but the longest context is "
            f"{max_len}; give less expected_prompt_tokens or expected_output_tokens"
        )
    few = _FEW_USERS if config.target == "latency" else config.max_num_seqs
    users = min(config.expected_users or few, config.max_num_seqs)
    return Load(users, prompt, output)


def _expert_cost(loaded: LoadedModel, layout: ModelLayout, slots: SlotBytes) -> ExpertCost:
    """Of this hardware, or of the nearest one where its rates are not known."""
    hardware = likely_hardware(loaded.model.device)
    cost = make_cost_model(loaded.model, layout, slots, loaded.name, hardware)
    return ExpertCost(cost, link_of(cost, cold_bytes=slots.cold_bytes), slots.plan)


def _asked_expert_bytes(config: EngineConfig, slots: SlotBytes) -> int:
    if config.expert_slots is not None:
        return slots(min(config.expert_slots, slots.num_experts))
    assert config.expert_gib is not None
    return int(config.expert_gib * GIB)


def check_options(config: EngineConfig, outline: PreTrainedModel) -> None:
    """Refuse options of experts that a model cannot follow, by its outline on `meta`.

    Raises:
        ConfigError: it has no experts that can be kept in host memory, or others than asked for.
    """
    if config.buffers_experts:
        check_buffering(outline, config)
    elif config.splits_memory and slot_bytes_of(outline, config) is None:
        _refuse_options_of_experts(config, type(outline).__name__)


def _refuse_options_of_experts(config: EngineConfig, name: str) -> None:
    for option in config.changed((*SPLIT_OPTIONS, *HOST_EXPERT_OPTIONS)):
        raise ConfigError(
            f"{option} is {getattr(config, option)!r}, but {name} has no experts that can be kept "
            "in host memory: it is dense, or computes its experts in its own way; leave "
            f"{option} out"
        )


def _report(
    config: EngineConfig, split: Split, load: Load, cost: ExpertCost, moving: MovingSplit | None
) -> str:
    moves = ""
    if moving is not None:
        region = moving.region
        moves = f", {region.fewest_slots} to {region.most_slots} as the load changes"
    return (
        f"split for {config.target}, {load.users:.0f} users of {load.prompt_tokens:.0f} + "
        f"{load.output_tokens:.0f} tokens: {_gib(split.kv_bytes)} for KV, "
        f"{_gib(split.expert_bytes)} for {split.num_slots} of {cost.num_experts} experts a layer"
        f"{moves}"
    )


def _prediction(split: Split, cost: ExpertCost, device: torch.device) -> str:
    """What the rates of this machine promise; by those of another one nothing is said."""
    if known_hardware(device) is None:
        where = gpu_name(device) or "this CPU"
        return (
            f"no prediction: the rates of {where} are not known; 'hotset probe' measures them, and "
            f"the split then follows them in place of the ratios of an {cost.cost.hardware.name}"
        )
    served, hardware = split.served, cost.cost.hardware
    decode, prompt = served.decode_step, served.prompt_step
    known = "" if hardware.measured else ", which 'hotset probe' would measure here"
    return (
        f"predicted: {served.output_tokens_per_s:,.0f} output tokens/s with "
        f"{served.at_once:.0f} users at once, a decode step {decode.seconds * 1e3:,.1f} ms "
        f"({decode.plan}), a step with prompts {prompt.seconds * 1e3:,.1f} ms ({prompt.plan}), "
        f"by the rates of {hardware.name}{known}"
    )


def _gib(num_bytes: int) -> str:
    """Three decimals, six of small sizes; never below."""
    digits = 3 if num_bytes >= GIB else 6
    scale = 10**digits
    return f"{-(-num_bytes * scale // GIB) / scale:.{digits}f} GiB"
