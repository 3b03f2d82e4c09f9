"""From one budget for KV and experts to a size for each. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from hotset.cost.expert_sizes import ExpertSizes, checked_sizes, with_disk
from hotset.cost.expert_split import KVMemory, Split, Splitter, least_bytes
from hotset.cost.expert_steps import ExpertCost, Load
from hotset.cost.slot_bytes import SlotBytes
from hotset.errors import ConfigError
from hotset.expert_options import SplitMemory
from hotset.memory.region import SharedRegion
from hotset.option_groups import ScheduleOptions
from hotset.units import gib_text

# What requests are like where the user does not say: a prompt and its answer, and how many of them
# there are where each step is to be short.
_PROMPT_TOKENS, _OUTPUT_TOKENS = 1024, 256
_FEW_USERS = 8


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
class SolvedSplit:
    """How a budget is split.

    Attributes:
        experts: their part.
        kv_bytes: the rest.
        moving: how it can move; None where it stays.
        report: what to say of it at start.
    """

    experts: ExpertSizes
    kv_bytes: int
    moving: MovingSplit | None
    report: str


@dataclass(frozen=True, slots=True)
class Rated:
    """How fast a Mixture of Experts runs here.

    Attributes:
        cost_of: its steps with slots of some kind, by the rates of this machine or of the nearest
            one that is known.
        is_known: whether they are this machine's.
        device_name: a GPU's by its driver, for messages.
    """

    cost_of: Callable[[SlotBytes], ExpertCost]
    is_known: bool
    device_name: str


def split_memory(
    asked: SplitMemory,
    slots: SlotBytes,
    rated: Rated,
    load: Load,
    kv: KVMemory,
    *,
    hot_bytes: int,
    given: str,
    has_longest: bool,
    max_step_tokens: int,
    device: str,
) -> SolvedSplit:
    """The best split of `hot_bytes` between KV and experts.

    Args:
        asked: by the user.
        slots: of the model's experts.
        rated: how fast it runs.
        load: what the split is for.
        kv: by the block.
        hot_bytes: for both.
        given: the option that they come from, and its value.
        has_longest: whether the user gave the longest context.
        max_step_tokens: most tokens of a step of prompts beside decodes, some experts on the host.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: a budget that is too small, or an option without effect.
    """
    slots, host_slots = with_disk(asked, slots)
    cost = rated.cost_of(slots)
    fewest_slots = max(slots.fewest, asked.expert_prefetch)
    splitter = Splitter(
        hot_bytes, cost, slots, kv, asked.target, max_step_tokens, fewest_slots, slots.num_experts
    )
    split = splitter.solve(load)
    if split is None:
        least = least_bytes(slots, kv, fewest_slots)
        raise ConfigError(
            f"{given} leaves {gib_text(hot_bytes)} for KV and experts, but the fewest slots of the "
            f"plan {slots.plan} and KV for one request of {load.context:.0f} tokens take "
            f"{gib_text(least)}; give at least {gib_text(least - hot_bytes)} more"
        )
    sizes = checked_sizes(asked, ExpertSizes(slots, split.num_slots, host_slots), device=device)
    moving = None
    if asked.move_split:
        split, moving = _let_move(split, load, splitter, slots, has_longest=has_longest)
        slots = replace(slots, fewest_ever=moving.region.fewest_slots)
        sizes = replace(sizes, slots=slots, num_slots=split.num_slots)
    report = f"{_report(asked, split, load, cost, moving)}\n{_prediction(split, cost, rated)}"
    return SolvedSplit(sizes, split.kv_bytes, moving, report)


def _let_move(
    split: Split, load: Load, splitter: Splitter, slots: SlotBytes, *, has_longest: bool
) -> tuple[Split, MovingSplit]:
    """Bounds for a split that moves, around one that does not and leaves some experts out.

    Steps are recorded with the passes that the fewest slots need, so these are half of what is best
    at start. The most leave one context of `max_model_len` and one expert in host memory; where
    none is asked for, they are twice as many, as what they leave is the longest context then.

    Returns:
        the best split of these, whose staging buffers have room for the experts beside the fewest
        slots; and how it can move.
    """
    fewest = max(splitter.fewest_slots, split.num_slots // 2)
    most = slots.num_experts - 1
    if not has_longest:
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


def expected_load(asked: SplitMemory, schedule: ScheduleOptions, max_len: int) -> Load:
    """What the split is for: requests as the user expects them, or as they often are.

    Raises:
        ConfigError: those of the user are longer than the longest context.
    """
    output = asked.expected_output_tokens
    if output is None:
        output = max(1, min(_OUTPUT_TOKENS, max_len // 5))
    prompt = asked.expected_prompt_tokens
    if prompt is None:
        prompt = max(1, min(_PROMPT_TOKENS, max_len - output))
    if prompt + output > max_len:
        raise ConfigError(
            f"requests of {prompt} + {output} tokens are expected, but the longest context is "
            f"{max_len}; give less expected_prompt_tokens or expected_output_tokens"
        )
    few = _FEW_USERS if asked.target == "latency" else schedule.max_num_seqs
    users = min(asked.expected_users or few, schedule.max_num_seqs)
    return Load(users, prompt, output)


def _report(
    asked: SplitMemory, split: Split, load: Load, cost: ExpertCost, moving: MovingSplit | None
) -> str:
    moves = ""
    if moving is not None:
        region = moving.region
        moves = f", {region.fewest_slots} to {region.most_slots} as the load changes"
    return (
        f"split for {asked.target}, {load.users:.0f} users of {load.prompt_tokens:.0f} + "
        f"{load.output_tokens:.0f} tokens: {gib_text(split.kv_bytes)} for KV, "
        f"{gib_text(split.expert_bytes)} for {split.num_slots} of {cost.num_experts} experts a "
        f"layer{moves}"
    )


def _prediction(split: Split, cost: ExpertCost, rated: Rated) -> str:
    """What the rates of this machine promise; by those of another one nothing is said."""
    served, hardware = split.served, cost.cost.hardware
    if not rated.is_known:
        return (
            f"no prediction: the rates of {rated.device_name} are not known; 'hotset probe' "
            "measures them, and the split then follows them in place of the ratios of an "
            f"{hardware.name}"
        )
    decode, prompt = served.decode_step, served.prompt_step
    known = "" if hardware.measured else ", which 'hotset probe' would measure here"
    return (
        f"predicted: {served.output_tokens_per_s:,.0f} output tokens/s with "
        f"{served.at_once:.0f} users at once, a decode step {decode.seconds * 1e3:,.1f} ms "
        f"({decode.plan}), a step with prompts {prompt.seconds * 1e3:,.1f} ms ({prompt.plan}), "
        f"by the rates of {hardware.name}{known}"
    )
