"""From a model, hardware, a layout and a workload to where bytes live and how fast it runs.

Imports no torch.
"""

import math
from dataclasses import dataclass, replace

from hotset.cost.layout import Layout, candidate_layouts, check_layout
from hotset.cost.prefix import bring_prefix
from hotset.cost.rates import Rates
from hotset.cost.shape import WEIGHT_BITS
from hotset.cost.step_time import CAUSES, PREFILL_CHUNK, CostModel, Step, Tiering
from hotset.cost.tuning import TUNINGS
from hotset.errors import PlanError
from hotset.plan.result import Plan
from hotset.plan.workload import Request

GIB = 2**30
HBM_SHARE = TUNINGS["cuda"].memory_share  # of HBM, as a server claims it
WORKSPACE_BYTES = 6e9  # activations, graphs and NCCL on a big GPU, and
WORKSPACE_SHARE = 0.06  # of HBM on a small one
BLOCK_SIZE = 16  # tokens, to which capacity is rounded
SLICE_TOKENS = 256  # that a user decodes before a parked one takes the place


def make_plan(request: Request) -> Plan:
    """Plan one case.

    Without a layout: `tp` over the GPUs given if that is possible, else the best layout there is.
    Without GPUs either: the smallest power of two, up to an NVLink domain, whose HBM holds the
    weights and one user.

    Raises:
        PlanError: the layout is impossible, or the weights or one user fit nowhere.
    """
    layout = request.layout
    if layout is not None:
        check_layout(layout, request.shape, request.gpus)
        return _plan_layout(request, layout)
    if request.gpus is not None:
        simple = Layout(tp=request.gpus)
        try:
            check_layout(simple, request.shape, request.gpus)
        except PlanError:
            return _best_of(request, candidate_layouts(request.shape, request.gpus))
        return _plan_layout(request, simple)
    sizes = [2**n for n in range(8) if 2**n <= max(1, request.hardware.peer_gpus)]
    tiered, first_error = None, None
    for gpus in sizes:
        layout = Layout(tp=gpus)
        try:
            check_layout(layout, request.shape, gpus)
            plan = _plan_layout(request, layout)
        except PlanError as error:
            first_error = first_error or error
            continue
        asked = request.host_given or request.expert_slots is not None
        if asked or plan.fits_whole:
            return plan
        tiered = tiered or plan
    if tiered:
        return tiered
    assert first_error is not None  # every size was tried
    raise PlanError(
        f"{first_error.problem}; no tensor-parallel layout of up to {sizes[-1]} "
        f"{request.hardware.name} holds it either: name the GPUs and a layout, more host memory, "
        "or narrower weights",
        field=first_error.field,
    )


def _best_of(request: Request, layouts: list[Layout]) -> Plan:
    plans, first_error = [], None
    for layout in layouts:
        try:
            plans.append(_plan_layout(request, layout))
        except PlanError as error:
            first_error = first_error or error
    if plans:
        return max(plans, key=lambda plan: plan.tokens_per_s)
    raise first_error or PlanError(f"no layout of {request.gpus} GPUs fits {request.shape.name}")


@dataclass(frozen=True)
class _Room:
    """Space for one layout: per GPU in HBM, in total on the host and on disk."""

    budget: float  # HBM beside dense weights, workspace and reserve
    kv_rank_bytes: float  # of one user, rounded to blocks
    kv_user_bytes: float  # one copy, rounded to blocks
    host: float
    disk: float


@dataclass(frozen=True)
class _Choice:
    """One way to run: how many at once in each group, and what lies where."""

    users: int
    tiering: Tiering
    mode: str
    step: Step
    turn: "_Turn"
    running: int

    @property
    def tokens_per_s(self) -> float:
        return self.running / self.step.expected_s


@dataclass(frozen=True)
class _Turn:
    """How the prompt of a turn becomes KV."""

    found: float
    recomputed: int
    load_s: float
    new_s: float  # prefill of what is new
    again_s: float  # prefill of what was found but is computed all the same
    busy_s: float  # what the chip spends on it when prompts share chunks

    @property
    def ttft_s(self) -> float:
        return max(self.load_s, self.again_s) + self.new_s


def _plan_layout(request: Request, layout: Layout) -> Plan:
    shape, hw, workload = request.shape, request.hardware, request.workload
    cost = CostModel(
        shape, hw, layout, request.kv_dtype, request.calibration, request.routing, request.overlap
    )
    gpus = layout.gpus
    workspace, claimed = _workspace_bytes(request), claimed_bytes(request)
    budget = claimed - workspace - cost.shard.dense_bytes
    if budget <= 0:
        raise PlanError(
            f"{cost.shard.dense_bytes / GIB:.1f} GiB of weights per GPU do not fit beside "
            f"{workspace / GIB:.1f} GiB of workspace in {claimed / GIB:.1f} of the "
            f"{hw.hbm_bytes / GIB:.1f} GiB of {hw.name} under {layout}; "
            "use more GPUs or narrower weights"
        )
    budget = _hot_budget(request, cost, budget)
    # A plan of fewer GPUs than a host has takes their share of its memory, unless that was given.
    per_host = gpus / hw.gpus_per_host
    host_share = max(1.0, per_host) if request.host_given else per_host

    def kv_bytes(tp: int) -> float:
        return shape.kv_bytes(
            workload.context,
            request.kv_dtype,
            tp=tp,
            block_size=BLOCK_SIZE,
            hold_windows=request.free_windows,
        )

    room = _Room(
        budget=budget,
        kv_rank_bytes=kv_bytes(layout.tp),
        kv_user_bytes=kv_bytes(1),
        host=hw.host_bytes * host_share,
        disk=hw.disk_bytes * max(1.0, per_host),
    )
    choice = max(_choices(request, cost, room), key=lambda c: (c.tokens_per_s, c.users))
    return _finish(request, cost, room, choice, workspace)


def _workspace_bytes(request: Request) -> float:
    """What a step takes beside weights and KV, on each GPU."""
    claimed = request.total_bytes or request.hardware.hbm_bytes
    return min(WORKSPACE_BYTES, WORKSPACE_SHARE * claimed)


def claimed_bytes(request: Request) -> float:
    """HBM of each GPU for weights, experts, KV and workspace."""
    return request.total_bytes or HBM_SHARE * request.hardware.hbm_bytes


def _hot_budget(request: Request, cost: CostModel, budget: float) -> float:
    """HBM of each GPU for KV and experts: what `hot_bytes` leaves of `budget`."""
    if request.hot_bytes is None:
        return budget
    hot = request.hot_bytes
    if request.expert_slots is not None:  # then it is for KV alone
        hot += staged_bytes(cost, request.expert_slots / request.shape.num_experts)
    if hot > budget:
        raise PlanError(
            f"is {request.hot_bytes / GIB:g}, and {budget / GIB:.1f} GiB are left beside dense "
            "weights and workspace for KV and experts; give less, or leave it out",
            field="hot_gib",
        )
    return hot


def staged_bytes(cost: CostModel, share: float) -> float:
    """HBM that resident slots and, unless all are, two staging buffers of a layer take."""
    experts = cost.shard.experts_bytes
    layers = max(1, len(cost.shape.moe_layers))
    return share * experts + (1 - share) * experts * min(1.0, 2 / layers)


def _largest_share(cost: CostModel, free: float) -> float:
    """Largest share of experts that fits in `free` bytes of HBM; negative if not even none."""
    experts = cost.shard.experts_bytes
    if free >= experts:
        return 1.0
    if free < 0 or not experts:
        return -1.0
    staging = min(1.0, 2 / len(cost.shape.moe_layers))
    if staging >= 1:
        return -1.0
    return (free / experts - staging) / (1 - staging)


def _choices(request: Request, cost: CostModel, room: _Room) -> list[_Choice]:
    """Every way to split HBM between experts and KV that is worth a look.

    For each number of users that run at once, KV takes what they need and experts the rest. The
    numbers are all up to 64 and then 3 % apart, so the split is solved, not guessed.
    """
    shape, workload = request.shape, request.workload
    wanted = -(-workload.users // cost.layout.dp)
    experts = cost.shard.experts_bytes
    fixed = None
    if request.expert_slots is not None:
        fixed = request.expert_slots / shape.num_experts
    below = room.host + room.disk  # where experts that are not resident must go

    def share_for(free: float) -> float | None:
        share = _largest_share(cost, free)
        if fixed is not None:
            return fixed if staged_bytes(cost, fixed) <= free else None
        share = min(1.0, share)
        return share if share >= 0 else None

    def tiering_for(share: float, host_kv: float = 0.0) -> Tiering | None:
        missing = (1 - share) * experts * cost.layout.gpus
        if missing > below:
            return None
        on_host = min(1.0, room.host / missing) if missing else 1.0
        return Tiering(share, on_host, host_kv)

    result = []
    for users in _grid(wanted):
        share = share_for(room.budget - users * room.kv_rank_bytes)
        tiering = None if share is None else tiering_for(share)
        if tiering is not None:
            result.append(_run(request, cost, room, users, tiering, "resident"))
    # KV read over the link each step: only worth it on a fast one, and only if not all fits.
    if request.stream_kv and room.host and (not result or result[-1].users < wanted):
        for users in _grid(wanted):
            for experts_first in (True, False):
                share = share_for(room.budget) if experts_first else 0.0
                if share is None or (fixed is not None and share != fixed):
                    continue
                left = room.budget - staged_bytes(cost, share)
                held = users * room.kv_rank_bytes
                streamed = 1 - left / held if left < held else 0.0
                rounds = (users * cost.layout.dp) * room.kv_user_bytes * streamed
                missing = (1 - share) * experts * cost.layout.gpus
                tiering = tiering_for(share, streamed)
                if left >= 0 and tiering and streamed and rounds + missing <= room.host:
                    result.append(_run(request, cost, room, users, tiering, "stream"))
                if not experts:
                    break
    if result:
        return result
    need = room.kv_rank_bytes + (staged_bytes(cost, fixed or 0.0) if below else experts)
    what = "one user"
    if experts > room.budget:
        what = "the experts and one user" if not below else "two layers of experts and one user"
    raise PlanError(
        f"{shape.name} does not fit {cost.layout} of {cost.hardware.name}: {what} of "
        f"{workload.context} tokens need {need / GIB:.1f} GiB beside the dense weights of each "
        f"GPU, {room.budget / GIB:.1f} GiB are left, and slower tiers hold {below / GIB:.0f} GiB; "
        "use more GPUs, a shorter context, narrower KV or weights, or more host memory"
    )


def _grid(most: int) -> list[int]:
    """1, 2, ... 64, then 3 % apart, up to and with `most`."""
    values, value = [], 1
    while value < most:
        values.append(value)
        value = value + 1 if value < 64 else math.ceil(value * 1.03)
    return [*values, most]


def _capacity(cost: CostModel, room: _Room, share: float) -> int:
    """Users whose KV fits into HBM in one group, beside that share of the experts."""
    left = room.budget - staged_bytes(cost, share)
    if room.kv_rank_bytes <= 0:
        return 10**9
    return max(0, int(left // room.kv_rank_bytes))


def _run(
    request: Request, cost: CostModel, room: _Room, users: int, tiering: Tiering, mode: str
) -> _Choice:
    """The step of `users` users in the fullest group."""
    workload, dp = request.workload, cost.layout.dp
    running = min(workload.users, users * dp)
    step = cost.decode(users, workload.decode_context, tiering, mean_users=running / dp)
    resident = users * dp if mode == "resident" else 0
    resident = max(resident, _capacity(cost, room, tiering.resident_experts) * dp)
    turn = _turn(request, cost, room, resident, tiering)
    parts = dict(step.parts)
    chip_s = step.expected_s
    if workload.output is not None:
        # Every `output` steps each running user starts a turn, whose prompt the chip computes.
        per_step = users / workload.output
        parts["prefill"] = per_step * turn.busy_s
        link_s = per_step * turn.load_s
    elif workload.users > resident and mode == "resident":
        link_s = users / SLICE_TOKENS * room.kv_rank_bytes / cost.link_bytes_per_s()
        if room.host + room.disk == 0:
            link_s = 0.0  # nowhere to park: the others wait outside
    else:
        link_s = 0.0
    parts["swap"] = max(0.0, link_s - chip_s - parts["prefill"])
    return _Choice(users, tiering, mode, replace(step, parts=parts), turn, running)


def _turn(request: Request, cost: CostModel, room: _Room, resident: int, tiering: Tiering) -> _Turn:
    """Find, load and compute the prompt of the mean turn."""
    workload, shape = request.workload, request.shape
    on_host = int(max(0.0, room.host) // max(1.0, room.kv_user_bytes))
    on_disk = int(room.disk // max(1.0, room.kv_user_bytes))
    held = min(1.0, (resident + on_host + on_disk) / workload.users)
    found = workload.wanted_tokens * held
    # Of several turns, what still lies in HBM needs no load. One turn finds what an earlier
    # request left in a tier, if there is one below HBM.
    warm = min(1.0, resident / workload.users)
    if workload.turns == 1 and on_host + on_disk:
        warm = 0.0
    cold = int(found * (1 - warm / held)) if held else 0
    new = workload.prompt_tokens - found
    prefill_rate = 0.0
    if cold:
        prefill_rate = cold / cost.prefill_s(cold, 0.0, tiering)
        early = shape.kv_bytes(workload.prompt_tokens, request.kv_dtype, tp=cost.layout.tp)
        bytes_per_token = early / workload.prompt_tokens
        below = min(1.0, on_host / max(1, on_host + on_disk, workload.users - resident))
        byte_s = below / cost.link_bytes_per_s() + (1 - below) / cost.disk_bytes_per_s()
        again = bring_prefix(
            Rates(prefill_rate, {"below": 1 / byte_s}),
            cold,
            ["below"],
            bytes_per_token=bytes_per_token,
            others_run=workload.users > 1,
        )
        load_s = (cold - again) * bytes_per_token * byte_s
    else:
        again, load_s = 0, 0.0
    again_s = again / prefill_rate if again else 0.0
    # Under load short prompts share a chunk.
    together = max(1, min(workload.users, int(PREFILL_CHUNK // max(1.0, new + again))))
    return _Turn(
        found=found,
        recomputed=again,
        load_s=load_s,
        new_s=cost.prefill_s(new, found, tiering),
        again_s=again_s,
        busy_s=cost.prefill_s(new + again, found - again, tiering, sequences=together) / together,
    )


def _finish(
    request: Request, cost: CostModel, room: _Room, choice: _Choice, workspace: float
) -> Plan:
    shape, hw, workload = request.shape, request.hardware, request.workload
    layout, gpus = cost.layout, cost.layout.gpus
    share = choice.tiering.resident_experts
    per_group = _capacity(cost, room, share)
    users_resident = per_group * layout.dp
    missing = (1 - share) * cost.shard.experts_bytes * gpus
    host_experts = min(missing, room.host)
    host_left = room.host - host_experts
    disk_left = room.disk - (missing - host_experts)
    kv_user = max(1.0, room.kv_user_bytes)
    on_host, on_disk = int(host_left // kv_user), int(disk_left // kv_user)
    held_users = min(choice.users, per_group) * layout.dp
    resident_kv = min(workload.users, per_group * layout.dp) * room.kv_rank_bytes * layout.tp
    if choice.mode == "stream":
        resident_kv = (1 - choice.tiering.host_kv) * (
            choice.running * room.kv_rank_bytes * layout.tp
        )
        held_users = int((1 - choice.tiering.host_kv) * choice.running)
    parked = max(0, workload.users - held_users)
    host_users = min(parked, on_host)
    used_gpus = request.gpus or gpus
    kv_bytes = shape.kv_bytes(workload.context, request.kv_dtype, hold_windows=request.free_windows)
    mode = choice.mode
    if mode == "resident" and workload.users > users_resident:
        mode = "park" if on_host + on_disk else "wait"
    return Plan(
        request=request,
        layout=layout,
        gpus=used_gpus,
        kv_bytes_per_user=kv_bytes,
        kv_copies=(
            room.kv_rank_bytes * layout.tp / room.kv_user_bytes if room.kv_user_bytes else 1.0
        ),
        hbm_bytes=hw.hbm_bytes * used_gpus,
        resident_weights_bytes=cost.shard.dense_bytes * gpus,
        resident_experts_bytes=share * cost.shard.experts_bytes * gpus,
        resident_kv_bytes=resident_kv,
        workspace_bytes=(workspace + staged_bytes(cost, share) - share * cost.shard.experts_bytes)
        * gpus,
        reserve_bytes=(hw.hbm_bytes - claimed_bytes(request)) * gpus,
        host_bytes=room.host,
        host_experts_bytes=host_experts,
        host_kv_bytes=host_users * kv_user,
        disk_bytes=room.disk,
        disk_kv_bytes=min(parked - host_users, on_disk) * kv_user,
        resident_expert_share=share,
        fits_whole=_capacity(cost, room, 1.0) > 0,
        users_resident=users_resident,
        users_total=users_resident + on_host + on_disk,
        users_running=choice.running,
        streamed_kv_share=choice.tiering.host_kv,
        mode=mode,
        step=choice.step,
        ttft_s=choice.turn.ttft_s,
        prefill_s=choice.turn.new_s + choice.turn.again_s,
        load_s=choice.turn.load_s,
        found_tokens=choice.turn.found,
        recomputed_tokens=choice.turn.recomputed,
        causes=_causes(request, cost, choice),
        cost=cost,
        tiering=choice.tiering,
        notes=_notes(request, cost, choice, users_resident, used_gpus),
    )


def _causes(request: Request, cost: CostModel, choice: _Choice) -> list[tuple[str, float]]:
    """What limits tokens/s, each with the factor gained if it took no time at all, most first.

    HBM capacity is what more users at once, and all experts resident, would give.
    """
    total = choice.step.expected_s
    gains: dict[str, float] = {}
    for name, seconds in choice.step.parts.items():
        if seconds <= 0:
            continue
        bound = choice.step.bounds.get(name)
        label = CAUSES[name] + (f" ({bound})" if bound else "")
        gains[label] = total / (total - seconds) if seconds < total else math.inf
    if choice.running < request.workload.users or choice.tiering != Tiering():
        dp = cost.layout.dp
        users = -(-request.workload.users // dp)
        free = cost.decode(
            users, request.workload.decode_context, mean_users=request.workload.users / dp
        )
        rate = request.workload.users / (
            free.expected_s + choice.step.parts["prefill"] * users / choice.users
        )
        gains["HBM capacity"] = rate / choice.tokens_per_s
    # Rounded, so that equal gains keep their order: what takes the time before what would avoid it.
    return sorted(gains.items(), key=lambda item: -round(item[1], 6))


def _notes(
    request: Request, cost: CostModel, choice: _Choice, users_resident: int, used_gpus: int
) -> list[str]:
    """What a reader should know before trusting the figures."""
    shape, workload, layout = request.shape, request.workload, cost.layout
    notes = []
    if shape.max_context and workload.context > shape.max_context:
        notes.append(
            f"context {workload.context} is beyond the {shape.max_context} the model is made for"
        )
    if used_gpus > layout.gpus:
        notes.append(f"{layout} uses {layout.gpus} of {used_gpus} GPUs; the others are idle")
    if workload.users > users_resident and choice.mode == "resident":
        notes.append(
            f"{choice.running} of {workload.users} users run at a time; the others take turns"
        )
    if note := shape.latent_note(request.kv_dtype):
        latent = shape.kv_bytes_per_token(request.kv_dtype)
        fewer = users_resident * latent // shape.expanded_kv_bytes_per_token(request.kv_dtype)
        notes.append(f"{note}: KV for {fewer:,} users in HBM, not {users_resident:,}")
    if layout.ep > 1 and shape.num_experts % layout.ep:
        slots = -(-shape.num_experts // layout.ep)
        notes.append(f"{slots * layout.ep - shape.num_experts} spare expert slots hold copies")
    if layout.ep > 1 and not request.routing.shares:
        notes.append("routing is taken as uniform; a measured histogram lowers tokens/s")
    dtype = shape.matrix_dtype
    used, _ = request.hardware.flops_for(dtype)
    if WEIGHT_BITS[dtype] < 16 and used == "bf16":
        notes.append(f"{request.hardware.name} multiplies {dtype} weights in bf16")
    return notes
