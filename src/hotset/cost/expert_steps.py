"""An MoE model with some of its experts in host memory: how long steps take, how much is served.

How the experts of a step are brought is `experts.bring_experts`.
"""

from dataclasses import dataclass

from hotset.cost.experts import bring_experts
from hotset.cost.step_time import CostModel


@dataclass(frozen=True, slots=True)
class ExpertLink:
    """What comes over the link, how fast, and how often it need not.

    Attributes:
        cold_bytes: of what a GPU has of one expert of one layer, as host memory holds it: fewer
            than on the device where its copy is narrower.
        gather_bytes_per_s: of experts that the device itself reads: those of the plan *cache*, and
            those that *auto* streams.
        copy_bytes_per_s: by the copy engine, for the plan *stream*.
        hit_rate: measured share of needed experts that have a slot; None is S/E.
    """

    cold_bytes: float
    gather_bytes_per_s: float
    copy_bytes_per_s: float
    hit_rate: float | None = None


def link_of(
    cost: CostModel, *, cold_bytes: float | None = None, hit_rate: float | None = None
) -> ExpertLink:
    """The link of a GPU of `cost`; host copies are as wide as the experts by default.

    Args:
        cost: of a layout, whose GPUs all use their links at once.
        cold_bytes: as `ExpertLink` has it.
        hit_rate: as `ExpertLink` has it.
    """
    own_bytes = cost.shape.expert_bytes_each / cost.layout.es
    return ExpertLink(
        cold_bytes=own_bytes if cold_bytes is None else cold_bytes,
        gather_bytes_per_s=cost.expert_bytes_per_s(),
        copy_bytes_per_s=cost.link_bytes_per_s(),
        hit_rate=hit_rate,
    )


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step.

    Attributes:
        plan: how experts come: `cache`, `stream`, or `resident` where all are on the device.
        seconds: all of it.
        chip_s: of these, what the step takes with all experts on the device.
        moved_bytes: of experts, over the link.
    """

    plan: str
    seconds: float
    chip_s: float
    moved_bytes: float


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be served.

    Attributes:
        users: requests that want to run at once.
        prompt_tokens: that each computes.
        output_tokens: that each answers.
        past_tokens: that each finds computed before its prompt.
        num_requests: all of them, at once; None is a queue that never ends.
    """

    users: float
    prompt_tokens: float
    output_tokens: float
    past_tokens: float = 0.0
    num_requests: float | None = None

    @property
    def context(self) -> float:
        """Tokens of KV that a request has in the end."""
        return self.past_tokens + self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Served:
    """A load under a KV capacity: of all requests, or of those that run at once and replace others.

    Attributes:
        at_once: requests that run together.
        num_requests: that the figures below are of.
        prompt_steps: steps with tokens of prompts, each of `prompt_step.seconds`; they decode too.
        decode_steps: steps of decodes alone.
        output_tokens_per_s: of answers.
    """

    at_once: float
    num_requests: float
    prompt_steps: float
    decode_steps: float
    prompt_step: StepTime
    decode_step: StepTime
    output_tokens_per_s: float

    @property
    def prompt_s(self) -> float:
        """All steps with tokens of prompts."""
        return self.prompt_steps * self.prompt_step.seconds

    @property
    def decode_s(self) -> float:
        """All steps of decodes alone."""
        return self.decode_steps * self.decode_step.seconds


class ExpertCost:
    """Times of one MoE model with its experts in two places.

    Args:
        cost: the model with all experts on the device, in a layout of one group. Slots are those
            of one of its GPUs.
        link: to the others.
        plan: `cache`, `stream`, or `auto` for whichever is faster for a step.
    """

    def __init__(self, cost: CostModel, link: ExpertLink, plan: str = "auto") -> None:
        assert cost.layout.dp == 1 and cost.shape.moe_layers
        self.cost = cost
        self.link = link
        self.plan = plan
        self.num_experts = cost.shard.expert_slots
        self.num_layers = len(cost.shape.moe_layers)

    def distinct(self, tokens: float) -> float:
        """Experts of a layer that a step of `tokens` tokens needs on the busiest GPU."""
        return self.cost.expert_slots_read(tokens)

    def step(self, num_slots: int, tokens: float, chip_s: float) -> StepTime:
        """A step of `tokens` tokens that takes `chip_s` with all experts on the device."""
        if num_slots >= self.num_experts:
            return StepTime("resident", chip_s, chip_s, 0.0)
        link, needed = self.link, self.distinct(tokens)
        hit_rate = num_slots / self.num_experts if link.hit_rate is None else link.hit_rate
        gather_s = link.cold_bytes / link.gather_bytes_per_s
        is_gathered = self.plan == "auto"
        brought = bring_experts(
            missed=needed - min(needed * hit_rate, float(num_slots)),
            absent=self.num_experts - num_slots,
            gather_s=gather_s,
            stream_s=gather_s if is_gathered else link.cold_bytes / link.copy_bytes_per_s,
            hidden_s=chip_s / self.num_layers,
            plan=self.plan,
            num_layers=self.num_layers,
        )
        moved_bytes = brought.num_moved * link.cold_bytes
        return StepTime(brought.plan, chip_s + brought.seconds, chip_s, moved_bytes)

    def decode_step(self, num_slots: int, users: float, context: float) -> StepTime:
        """A step of `users` decodes with `context` tokens each."""
        return self.step(num_slots, users, self.cost.decode(users, context).expected_s)

    def prompt_step(
        self, num_slots: int, tokens: float, load: Load, *, decodes: float = 0.0
    ) -> StepTime:
        """A step of `tokens` tokens of prompts, beside decodes."""
        cost = self.cost
        share = tokens / load.prompt_tokens
        chip_s = cost.chunk_s(tokens)
        chip_s += share * cost.prefill_attention_s(
            load.prompt_tokens, load.past_tokens, chunk=tokens
        )
        if decodes:
            parts = cost.decode(decodes, load.context - load.output_tokens / 2).parts
            chip_s += parts["attention"] + parts["per_user"]
        return self.step(num_slots, tokens, chip_s)

    def serve(
        self, num_slots: int, load: Load, *, kv_tokens: float, max_step_tokens: float
    ) -> Served:
        """What becomes of `load` with KV for `kv_tokens` tokens.

        Prompts fill steps of `max_step_tokens` tokens, of which C requests need

            P = max(1, C * prompt / max_step_tokens).

        Those that start in one step end in one, and others take their places: with answers of O
        tokens the C requests are replaced every max(P, O) steps, of which P carry prompts. Of N
        requests the last ones decode alone in the end. More than O * max_step_tokens / prompt
        requests never run at once: the first ones have ended before the last ones start.
        """
        prompt, output = load.prompt_tokens, load.output_tokens
        at_once = min(load.users, kv_tokens / load.context)
        if load.num_requests is not None:
            at_once = min(at_once, load.num_requests)
        at_once = max(1.0, min(at_once, output * max_step_tokens / prompt))
        step_tokens = min(max_step_tokens, at_once * prompt)
        per_wave = at_once * prompt / step_tokens  # P
        period = max(per_wave, output)
        if load.num_requests is None:
            num_requests, steps, prompt_steps = at_once, period, per_wave
        else:
            num_requests = load.num_requests
            waves = max(1.0, num_requests / at_once)
            steps = per_wave + (waves - 1) * period + output - 1
            prompt_steps = waves * per_wave
        prompt_step = self.prompt_step(num_slots, step_tokens, load, decodes=at_once)
        decode_step = self.decode_step(num_slots, at_once, load.context - output / 2)
        decode_steps = max(0.0, steps - prompt_steps)
        seconds = prompt_steps * prompt_step.seconds + decode_steps * decode_step.seconds
        return Served(
            at_once=at_once,
            num_requests=num_requests,
            prompt_steps=prompt_steps,
            decode_steps=decode_steps,
            prompt_step=prompt_step,
            decode_step=decode_step,
            output_tokens_per_s=num_requests * output / seconds,
        )
