"""From a model, hardware, a layout and a workload to where bytes live and how fast it runs.

Imports no torch.
"""

import math
from typing import NamedTuple

from hotset.cost import hot_set
from hotset.cost.hot_plan import HotPlan
from hotset.cost.layout import candidate_layouts, check_layout
from hotset.cost.params import WEIGHT_BITS
from hotset.cost.step_time import CAUSES, CostModel, Tiering
from hotset.cost.wire import MOST_WITHOUT_NVLINK
from hotset.errors import PlanError
from hotset.layout import Layout
from hotset.plan.choices import (
    BLOCK_SIZE,
    GIB,
    Choice,
    Room,
    capacity,
    choices,
    claimed_bytes,
    hot_budget,
    speed,
    staged_bytes,
    workspace_bytes,
)
from hotset.plan.hot_set import find_hot_set
from hotset.plan.result import Plan
from hotset.plan.text import seconds
from hotset.plan.workload import Request


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
            return rank_layouts(request)[0]
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
        f"{first_error}; no tensor-parallel layout of up to {sizes[-1]} "
        f"{request.hardware.name} holds it either: name the GPUs and a layout, more host memory, "
        "or narrower weights"
    )


def rank_layouts(request: Request) -> list[Plan]:
    """A plan for each layout of the GPUs given that holds the model, most tokens/s first.

    Of equal ones the simpler comes first.

    Raises:
        PlanError: none does; why the last one, which cuts most, does not.
    """
    assert request.gpus is not None
    plans, last_error = [], None
    for layout in candidate_layouts(request.shape, request.gpus):
        try:
            plans.append(_plan_layout(request, layout))
        except PlanError as error:
            last_error = error
    if not plans:
        raise last_error or PlanError(f"no layout of {request.gpus} GPUs fits {request.shape.name}")
    return sorted(plans, key=lambda plan: -plan.tokens_per_s)


def _plan_layout(request: Request, layout: Layout) -> Plan:
    shape, hw, workload = request.shape, request.hardware, request.workload
    cost = CostModel(
        shape, hw, layout, request.kv_dtype, request.calibration, request.routing, request.overlap
    )
    gpus = layout.gpus
    workspace, claimed = workspace_bytes(request, layout), claimed_bytes(request)
    budget = claimed - workspace - cost.shard.dense_bytes
    if budget <= 0:
        raise PlanError(
            f"{cost.shard.dense_bytes / GIB:.1f} GiB of weights per GPU do not fit beside "
            f"{workspace / GIB:.1f} GiB of workspace in {claimed / GIB:.1f} of the "
            f"{hw.hbm_bytes / GIB:.1f} GiB of {hw.name} under {layout}; "
            "use more GPUs or narrower weights"
        )
    budget = hot_budget(request, cost, budget)
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

    room = Room(
        budget=budget,
        kv_rank_bytes=kv_bytes(layout.tp),
        kv_user_bytes=kv_bytes(1),
        host=hw.host_bytes * host_share,
        disk=hw.disk_bytes * max(1.0, per_host),
    )
    choice = max(choices(request, cost, room), key=speed)
    return _finish(request, cost, room, choice, workspace)


def _finish(
    request: Request, cost: CostModel, room: Room, choice: Choice, workspace: float
) -> Plan:
    hw, layout, gpus = request.hardware, cost.layout, cost.layout.gpus
    share, used_gpus = choice.tiering.resident_experts, request.gpus or gpus
    held = _held(request, cost, room, choice)
    mode = choice.mode
    if mode == "resident" and request.workload.users > held.users_resident:
        mode = "park" if held.on_host + held.on_disk else "wait"
    staged = staged_bytes(cost, share) - share * cost.shard.experts_bytes
    kv_user = room.kv_user_bytes
    return Plan(
        request=request,
        layout=layout,
        gpus=used_gpus,
        kv_bytes_per_user=request.shape.kv_bytes(
            request.workload.context, request.kv_dtype, hold_windows=request.free_windows
        ),
        kv_copies=room.kv_rank_bytes * layout.tp / kv_user if kv_user else 1.0,
        hbm_bytes=hw.hbm_bytes * used_gpus,
        resident_weights_bytes=cost.shard.dense_bytes * gpus,
        resident_experts_bytes=share * cost.shard.experts_bytes * gpus,
        resident_kv_bytes=held.resident_kv_bytes,
        workspace_bytes=(workspace + staged) * gpus,
        reserve_bytes=(hw.hbm_bytes - claimed_bytes(request)) * gpus,
        host_bytes=room.host,
        host_experts_bytes=held.host_experts_bytes,
        host_kv_bytes=held.host_kv_bytes,
        disk_bytes=room.disk,
        disk_kv_bytes=held.disk_kv_bytes,
        fits_whole=capacity(cost, room, 1.0) > 0,
        users_resident=held.users_resident,
        users_total=held.users_resident + held.on_host + held.on_disk,
        mode=mode,
        choice=choice,
        causes=_causes(request, cost, choice),
        cost=cost,
        notes=_notes(request, cost, choice, held.users_resident, used_gpus),
        hot_set=_hot_set(request, cost, room),
    )


class _Held(NamedTuple):
    """Users and their KV by tier; users that a slower tier could hold."""

    users_resident: int
    on_host: int
    on_disk: int
    host_experts_bytes: float
    resident_kv_bytes: float
    host_kv_bytes: float
    disk_kv_bytes: float


def _held(request: Request, cost: CostModel, room: Room, choice: Choice) -> _Held:
    users, layout, tiering = request.workload.users, cost.layout, choice.tiering
    missing = (1 - tiering.resident_experts) * cost.shard.experts_bytes * layout.gpus
    host_experts = min(missing, room.host)
    kv_user = max(1.0, room.kv_user_bytes)
    on_host = int((room.host - host_experts) // kv_user)
    on_disk = int((room.disk - (missing - host_experts)) // kv_user)
    per_group = capacity(cost, room, tiering.resident_experts)
    fit = per_group * layout.dp
    in_hbm, copies_of = min(choice.users, per_group) * layout.dp, float(min(users, fit))
    if choice.mode == "stream":
        copies_of = (1 - tiering.host_kv) * choice.running
        in_hbm = int(copies_of)
    parked = max(0, users - in_hbm)
    host_users = min(parked, on_host)
    return _Held(
        users_resident=fit,
        on_host=on_host,
        on_disk=on_disk,
        host_experts_bytes=host_experts,
        resident_kv_bytes=copies_of * room.kv_rank_bytes * layout.tp,
        host_kv_bytes=host_users * kv_user,
        disk_kv_bytes=min(parked - host_users, on_disk) * kv_user,
    )


def _hot_set(request: Request, cost: CostModel, room: Room) -> HotPlan | None:
    """With all experts resident, as what a step waits for beside them is not known."""
    experts = cost.shard.experts_bytes
    if experts > room.budget:
        return None
    return find_hot_set(
        request, cost, hot_set.Room(room.budget - experts, room.host / cost.layout.dp)
    )


def _causes(request: Request, cost: CostModel, choice: Choice) -> list[tuple[str, float]]:
    """What limits tokens/s, each with the factor gained if it took no time at all, most first.

    HBM capacity is what more users at once, and all experts resident, would give.
    """
    total = choice.step.expected_s
    gains: dict[str, float] = {}
    for name, part_s in choice.step.parts.items():
        if part_s <= 0:
            continue
        bound = choice.step.bounds.get(name)
        label = CAUSES[name] + (f" ({bound})" if bound else "")
        gains[label] = total / (total - part_s) if part_s < total else math.inf
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
    request: Request, cost: CostModel, choice: Choice, users_resident: int, used_gpus: int
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
    if layout.ep > 1 and shape.num_experts % layout.ep:
        slots = -(-shape.num_experts // layout.ep)
        notes.append(f"{slots * layout.ep - shape.num_experts} spare expert slots hold copies")
    if layout.ep > 1 and not request.routing.shares:
        notes.append("routing is taken as uniform; a measured histogram lowers tokens/s")
    hw = request.hardware
    comm_s = choice.step.parts["all_reduce"] + choice.step.parts["all_to_all"]
    if comm_s and hw.peer_bytes_per_s <= MOST_WITHOUT_NVLINK:
        notes.append(
            f"GPUs of {hw.name} have no NVLink: what they exchange takes {seconds(comm_s)} of each "
            f"step of {seconds(choice.step.expected_s)}"
        )
    dtype = shape.matrix_dtype
    used, _ = hw.flops_for(dtype)
    if WEIGHT_BITS[dtype] < 16 and used == "bf16":
        notes.append(f"{hw.name} multiplies {dtype} weights in bf16")
    return notes
