"""The hot set of a plan: what requests that turn hot would give, and the lines that say so.

Imports no torch.
"""

from hotset.cost.hot_plan import HotPlan, plan_hot_set
from hotset.cost.hot_set import HotSetCost, Room, SparseCache
from hotset.cost.selection import DrawnSelections
from hotset.cost.step_time import CostModel
from hotset.plan.text import seconds
from hotset.plan.workload import Request


def find_hot_set(request: Request, cost: CostModel, room: Room) -> HotPlan | None:
    """The best hot set of one group of GPUs.

    None where the model has no indexer, or no hot request fits and keeps `tpot_s`.

    Args:
        request: what is planned.
        cost: of steps; all experts are on the device.
        room: of one GPU, beside weights and workspace, and its group's share of the host.
    """
    cache = SparseCache.of(request.shape, request.kv_dtype)
    if cache is None:
        return None
    hot = HotSetCost(
        cost,
        cache,
        request.selections,
        request.workload.decode_context,
        prefetch=request.row_prefetch,
        right=request.selection_guessed,
    )
    wanted = -(-request.workload.users // cost.layout.dp)
    return plan_hot_set(hot, room, wanted, tpot_s=request.tpot_s)


def hot_set_lines(request: Request, hot: HotPlan | None, groups: int) -> list[str]:
    """What a plan says of its hot set; nothing for a model without an indexer.

    Args:
        request: what is planned.
        hot: its hot set.
        groups: of GPUs that all work alike.
    """
    cache = SparseCache.of(request.shape, request.kv_dtype)
    if cache is None:
        return []
    kept = "" if request.tpot_s is None else f" within {request.tpot_s * 1e3:g} ms"
    if hot is None:
        return [
            f"Hot set    none turns hot: none fits{kept}, or contexts are hardly longer than the "
            f"{cache.top_k:,} selected tokens"
        ]
    step, resident = hot.hot, hot.resident
    if resident and not step.num_hot:
        return [f"Hot set    none turns hot: {step.users * groups:,} users are resident{kept}"]
    if not hot.pays:
        return [
            f"Hot set    none turns hot: {step.users * groups:,} users, {step.num_hot * groups:,} "
            f"of them hot, would get {hot.gain:.2f}x the tokens/s"
        ]
    head = f"{hot.slots:,} of {hot.cost.context:,.0f} tokens per hot user and layer on the device"
    cells = _cells(request, hot, groups)
    return ["", f"Hot set: {head}", *(f"  {name:<12} {text}" for name, text in cells)]


def _cells(request: Request, hot: HotPlan, groups: int) -> list[tuple[str, str]]:
    cache, step, resident = hot.cost.cache, hot.hot, hot.resident
    missed = hot.rows.missed
    before, a_user, gain = "0", "", ""
    if resident:
        before, a_user = f"{resident.tokens_per_s * groups:,.0f}", f"{1 / resident.seconds:.0f} -> "
        gain = f" ({hot.gain:.1f}x)"
    fit = resident.users * groups if resident else 0
    pays = f"from {hot.break_even * groups:,} users on" if hot.break_even else "never"
    return [
        ("selected", f"{cache.top_k:,} per step and layer; {_overlap(request)}"),
        *_by_layer(request),
        (
            "users",
            f"{fit:,} resident, or {step.users * groups:,} with {step.num_hot * groups:,} "
            f"hot; limited by {hot.limit}",
        ),
        ("pays", pays),
        ("host memory", f"{hot.host_bytes * groups / 1e9:.1f} GB"),
        (
            "misses",
            f"{missed:,.0f} per hot user and layer (hits {1 - missed / cache.top_k:.0%}): "
            f"{step.missed_bytes / 1e9:.2f} GB per GPU at "
            f"{hot.cost.rows_bytes_per_s / 1e9:.0f} GB/s",
        ),
        *_ahead(hot),
        (
            "step",
            f"{seconds(step.seconds)}, of which {seconds(step.link_s - step.hidden_s)} wait "
            f"for the link; {seconds(step.chip_s)} without one",
        ),
        (
            "tokens/s",
            f"{before} -> {step.tokens_per_s * groups:,.0f}{gain}; per user {a_user}"
            f"{1 / step.seconds:.0f}",
        ),
    ]


def _overlap(request: Request) -> str:
    selections = request.selections
    if isinstance(selections, DrawnSelections):
        return f"overlap {selections.overlap:.2f} (assumed; --selection-overlap, --selection)"
    assumed = DrawnSelections().overlap
    return f"overlap {selections.overlap:.2f} (recorded; {assumed:.2f} is assumed without a file)"


def _ahead(hot: HotPlan) -> list[tuple[str, str]]:
    """What comes before it is selected, where layers are guessed for."""
    rows = hot.rows
    if not rows.guessed:
        return []
    text = (
        f"{rows.guessed:,.0f} more, guessed, {rows.right:,.0f} of them right; a guess has "
        f"{hot.cost.right:.0%} of a selection (assumed; --selection-guessed)"
    )
    return [("ahead", text)]


def _by_layer(request: Request) -> list[tuple[str, str]]:
    """The overlap of each layer that selects, where it was recorded."""
    overlaps = getattr(request.selections, "layer_overlaps", ())
    return [("by layer", " ".join(f"{each:.2f}" for each in overlaps))] if overlaps else []


def as_dict(hot: HotPlan | None, groups: int) -> dict[str, object] | None:
    """For `--json`: sums over groups, and what one step of a group takes."""
    if hot is None:
        return None
    step, resident = hot.hot, hot.resident
    return {
        "slots": hot.slots,
        "selected_tokens": hot.cost.cache.top_k,
        "context_tokens": hot.cost.context,
        "overlap": hot.cost.selections.overlap,
        "overlap_by_layer": list(getattr(hot.cost.selections, "layer_overlaps", ())),
        "users_resident": resident.users * groups if resident else 0,
        "users": step.users * groups,
        "users_hot": step.num_hot * groups,
        "host_bytes": hot.host_bytes * groups,
        "limit": hot.limit,
        "break_even_users": hot.break_even * groups if hot.break_even else None,
        "misses": hot.rows.missed,
        "guessed": hot.rows.guessed,
        "guessed_right": hot.rows.right,
        "missed_bytes": step.missed_bytes,
        "link_bytes_per_s": hot.cost.rows_bytes_per_s,
        "step_s": step.seconds,
        "link_s": step.link_s,
        "hidden_s": step.hidden_s,
        "no_link_step_s": step.chip_s,
        "resident_step_s": resident.seconds if resident else None,
        "tokens_per_s": step.tokens_per_s * groups,
        "resident_tokens_per_s": resident.tokens_per_s * groups if resident else 0.0,
        "gain": hot.gain,
    }
