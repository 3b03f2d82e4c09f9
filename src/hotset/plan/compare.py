"""Several cases side by side, each ratio split into what capacity gives and what speed gives."""

from dataclasses import dataclass

from hotset.plan.result import Plan


@dataclass(frozen=True)
class Ratio:
    """One case against the first; `tokens_per_s_per_gpu` is `capacity` times `speed`.

    Attributes:
        case: its name.
        tokens_per_s_per_gpu: over the first case's.
        capacity: what running more (or fewer) users at once gives of it.
        speed: the same if both ran the first case's number of users per GPU.
        tpot: time per token, over the first case's.
        ttft: time to first token, over the first case's.
    """

    case: str
    tokens_per_s_per_gpu: float
    capacity: float
    speed: float
    tpot: float
    ttft: float


def compare_plans(names: list[str], plans: list[Plan]) -> list[Ratio]:
    """Every plan but the first against the first."""
    first = plans[0]
    return [_ratio(name, plan, first) for name, plan in zip(names[1:], plans[1:], strict=True)]


def _per_gpu(plan: Plan) -> float:
    return plan.tokens_per_s / plan.gpus


def _ratio(name: str, plan: Plan, first: Plan) -> Ratio:
    total = _per_gpu(plan) / _per_gpu(first)
    users = first.users_running * plan.gpus / first.gpus
    same = rate_at(plan, users) / plan.gpus
    speed = same / _per_gpu(first)
    return Ratio(
        case=name,
        tokens_per_s_per_gpu=total,
        capacity=total / speed,
        speed=speed,
        tpot=plan.step.expected_s / first.step.expected_s,
        ttft=plan.turn.ttft_s / first.turn.ttft_s if first.turn.ttft_s else 1.0,
    )


def rate_at(plan: Plan, users: float) -> float:
    """Tokens/s of a plan's layout and tiers with another number of users running at once.

    Whether their KV fits is not asked: it is the speed alone.
    """
    if users == plan.users_running:
        return plan.tokens_per_s
    cost, layout = plan.cost, plan.layout
    per_group = users / layout.dp
    context = plan.request.workload.decode_context
    step = cost.decode(max(1.0, per_group), context, plan.choice.tiering, mean_users=per_group)
    # Work that comes with each user: prefill of turns, and swapping.
    own_s = (plan.step.parts["prefill"] + plan.step.parts["swap"]) * users / plan.users_running
    return users / (step.expected_s + own_s)
