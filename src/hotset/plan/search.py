"""Plans over a range: a sweep of users or context, and the best layout for a latency target."""

from dataclasses import dataclass, replace

from hotset.cost.layout import candidate_layouts
from hotset.errors import PlanError
from hotset.plan.planner import make_plan
from hotset.plan.result import Plan
from hotset.plan.workload import Request


@dataclass(frozen=True)
class SweepPoint:
    """One value of a sweep: its plan, or why there is none."""

    value: int
    plan: Plan | None
    error: str = ""


def sweep(request: Request, field: str, values: list[int]) -> list[SweepPoint]:
    """A plan for each value of a `Workload`'s `users` or `context`.

    The layout is settled at the first value that works, and then kept.
    """
    points: list[SweepPoint] = []
    layout = request.layout
    for value in values:
        try:
            workload = replace(request.workload, **{field: value})
            plan = make_plan(replace(request, workload=workload, layout=layout))
        except PlanError as error:
            points.append(SweepPoint(value, None, str(error)))
            continue
        layout = plan.layout
        points.append(SweepPoint(value, plan))
    if not any(point.plan for point in points):
        raise PlanError(points[0].error)
    return points


@dataclass(frozen=True)
class Target:
    """Latency asked for, in seconds; None does not ask."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met_by(self, plan: Plan) -> bool:
        """Whether a plan keeps it."""
        ttft_ok = self.ttft_s is None or plan.turn.ttft_s <= self.ttft_s
        return ttft_ok and (self.tpot_s is None or plan.step.expected_s <= self.tpot_s)


@dataclass(frozen=True)
class Candidate:
    """A layout, and the most users that keep the target in it; 0 where not even one does."""

    plan: Plan
    users: int


def find_best(request: Request, target: Target) -> list[Candidate]:
    """Every layout of the GPUs given, best first.

    Without GPUs all powers of two of an NVLink domain are tried. Each layout gets the most
    users that keep the target, all running at once or taking turns as the plan says. Layouts
    that serve all users come first, by tokens/s per GPU; the others follow, most users first.

    Raises:
        PlanError: no layout holds the model at all.
    """
    if request.gpus is not None:
        counts = [request.gpus]
    else:
        counts = [n for n in (1, 2, 4, 8, 16, 32, 72) if n <= request.hardware.peer_gpus]
    found: list[Candidate] = []
    error: PlanError | None = None
    for count in counts:
        layouts = [request.layout] if request.layout else candidate_layouts(request.shape, count)
        for layout in layouts:
            try:
                found.append(_most_users(replace(request, layout=layout, gpus=count), target))
            except PlanError as problem:
                error = error or problem
    if not found:
        raise error or PlanError(f"no layout of {counts} GPUs can hold {request.shape.name}")
    return sorted(found, key=lambda c: (-c.users, -c.plan.tokens_per_s / c.plan.gpus))


def _most_users(request: Request, target: Target) -> Candidate:
    """Bisect for the most users that keep the target; a step only grows with users."""

    def plan_for(users: int) -> Plan:
        return make_plan(replace(request, workload=replace(request.workload, users=users)))

    most = request.workload.users
    plan = plan_for(most)
    if target.met_by(plan):
        return Candidate(plan, most)
    low_plan = plan_for(1)
    if not target.met_by(low_plan):
        return Candidate(low_plan, 0)
    low, high, best = 1, most, low_plan
    while high - low > 1:
        middle = (low + high) // 2
        plan = plan_for(middle)
        if target.met_by(plan):
            low, best = middle, plan
        else:
            high = middle
    return Candidate(best, low)
