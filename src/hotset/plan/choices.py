"""Every way to run a workload under one layout: how many at once, and what lies where.

Imports no torch.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from hotset.cost.attention import KV_BYTES
from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.prefix import split_prefix
from hotset.cost.rates import Rates
from hotset.cost.step_time import PREFILL_CHUNK, CostModel, Step, Tiering
from hotset.cost.tuning import TUNINGS
from hotset.cost.workspace import StepWidths, step_bytes
from hotset.errors import PlanError
from hotset.layout import Layout
from hotset.options import OPTIONS
from hotset.plan.workload import Request

GIB = 2**30
HBM_SHARE = TUNINGS["cuda"].memory_share  # of HBM, as a server claims it
# Of other engines and of several GPUs: activations, graphs and NCCL on a big GPU, and
_WORKSPACE_BYTES = 6e9
_WORKSPACE_SHARE = 0.06  # of HBM on a small one
BLOCK_SIZE = 16  # tokens, to which capacity is rounded
SLICE_TOKENS = 256  # that a user decodes before a parked one takes the place


@dataclass(frozen=True)
class Room:
    """Space for one layout: per GPU in HBM, in total on the host and on disk."""

    budget: float  # HBM beside dense weights, workspace and reserve
    kv_rank_bytes: float  # of one user, rounded to blocks
    kv_user_bytes: float  # one copy, rounded to blocks
    host: float
    disk: float


@dataclass(frozen=True)
class Choice:
    """One way to run: how many at once in each group, and what lies where."""

    users: int
    tiering: Tiering
    mode: str
    step: Step
    turn: "Turn"
    running: int

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all users together."""
        return self.running / self.step.expected_s


@dataclass(frozen=True)
class Turn:
    """How the prompt of a turn becomes KV."""

    found: float
    recomputed: int
    load_s: float
    new_s: float  # prefill of what is new
    again_s: float  # prefill of what was found but is computed all the same
    busy_s: float  # what the chip spends on it when prompts share chunks

    @property
    def prefill_s(self) -> float:
        """Of all that is computed."""
        return self.new_s + self.again_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token, without queueing."""
        return max(self.load_s, self.again_s) + self.new_s


def workspace_bytes(request: Request, layout: Layout) -> float:
    """What a step takes beside weights and KV, on each GPU: as a server with its defaults counts.

    Servers run on one GPU so far; for more, and for other engines, it is a share.
    """
    shape, claimed = request.shape, request.total_bytes or request.hardware.hbm_bytes
    share = min(_WORKSPACE_BYTES, _WORKSPACE_SHARE * claimed)
    if layout.gpus > 1 or request.calibration != CALIBRATIONS["hotset"]:
        return share
    return step_bytes(
        StepWidths.of(shape),
        KV_BYTES[shape.plain_dtype],
        device="cuda",
        max_tokens=OPTIONS["max_num_batched_tokens"].default,
        max_seqs=min(OPTIONS["max_num_seqs"].default, request.workload.users),
        widens=request.kv_dtype != shape.plain_dtype,
    )


def claimed_bytes(request: Request) -> float:
    """HBM of each GPU for weights, experts, KV and workspace: all of it beside `hot_bytes`."""
    share = HBM_SHARE if request.hot_bytes is None else 1.0
    return request.total_bytes or share * request.hardware.hbm_bytes


def hot_budget(request: Request, cost: CostModel, budget: float) -> float:
    """HBM of each GPU for KV and experts: what `hot_bytes` leaves of `budget`."""
    if request.hot_bytes is None:
        return budget
    hot = request.hot_bytes
    if request.expert_slots is not None:  # then it is for KV alone
        hot += staged_bytes(cost, request.expert_slots / request.shape.num_experts)
    if hot > budget:
        raise PlanError(
            f"hot_gib is {request.hot_bytes / GIB:g}, and {budget / GIB:.1f} GiB are left beside "
            "dense weights and workspace for KV and experts; give less, or leave it out"
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


@dataclass(frozen=True)
class _Splits:
    """How experts can be split over HBM and slower tiers, under one layout."""

    cost: CostModel
    room: Room
    fixed: float | None  # the share of experts that was asked for

    @property
    def slower_bytes(self) -> float:
        """Where experts that are not resident must go."""
        return self.room.host + self.room.disk

    def share_for(self, free: float) -> float | None:
        """The share of experts to keep in `free` bytes of HBM; None where that cannot be."""
        if self.fixed is not None:
            return self.fixed if staged_bytes(self.cost, self.fixed) <= free else None
        share = min(1.0, _largest_share(self.cost, free))
        return share if share >= 0 else None

    def missing_bytes(self, share: float) -> float:
        """Experts that are not resident, on all GPUs."""
        return (1 - share) * self.cost.shard.experts_bytes * self.cost.layout.gpus

    def tiering_for(self, share: float, host_kv: float = 0.0) -> Tiering | None:
        """Where they lie; None where slower tiers have no room for them."""
        missing = self.missing_bytes(share)
        if missing > self.slower_bytes:
            return None
        on_host = min(1.0, self.room.host / missing) if missing else 1.0
        return Tiering(share, on_host, host_kv)


def choices(request: Request, cost: CostModel, room: Room) -> list[Choice]:
    """Every way to split HBM between experts and KV that is worth a look.

    For each number of users that run at once, KV takes what they need and experts the rest. The
    numbers are all up to 64 and then 3 % apart, and between these those around the best one, so the
    split is solved, not guessed.

    Raises:
        PlanError: no split holds one user.
    """
    wanted = -(-request.workload.users // cost.layout.dp)
    fixed = None
    if request.expert_slots is not None:
        fixed = request.expert_slots / request.shape.num_experts
    splits = _Splits(cost, room, fixed)

    @functools.cache
    def resident(users: int) -> Choice | None:
        share = splits.share_for(room.budget - users * room.kv_rank_bytes)
        tiering = None if share is None else splits.tiering_for(share)
        if tiering is None:
            return None
        return _run(request, cost, room, users, tiering, "resident")

    grid = _grid(wanted)
    result = [choice for users in grid if (choice := resident(users))]
    if result:
        best = grid.index(max(result, key=speed).users)
        around = grid[max(0, best - 1)], grid[min(best + 1, len(grid) - 1)]
        result.append(_peak(resident, *around))
    # KV read over the link each step: only worth it on a fast one, and only if not all fits.
    if request.stream_kv and room.host and (not result or result[-1].users < wanted):
        result += _streaming(request, splits, wanted)
    if not result:
        raise _too_large(request, splits)
    return result


def speed(choice: Choice) -> tuple[float, int]:
    """By which choices are compared."""
    return choice.tokens_per_s, choice.users


def _peak(run: Callable[[int], Choice | None], low: int, high: int) -> Choice:
    """The fastest from `low` to `high`, which rises up to it and falls, or does not fit, beyond."""

    def rate(users: int) -> tuple[float, int]:
        choice = run(users)
        return speed(choice) if choice else (-1.0, -users)

    while high - low > 2:
        third = (high - low) // 3
        left, right = low + third, high - third
        low, high = (left, high) if rate(left) < rate(right) else (low, right)
    found = run(max(range(low, high + 1), key=rate))
    assert found is not None  # one of them fits
    return found


def _streaming(request: Request, splits: _Splits, wanted: int) -> Iterator[Choice]:
    """Ways in which a part of the KV stays in host memory and is read over the link."""
    cost, room = splits.cost, splits.room
    experts = cost.shard.experts_bytes
    for users in _grid(wanted):
        for experts_first in (True, False) if experts else (True,):
            share = splits.share_for(room.budget) if experts_first else 0.0
            if share is None or (splits.fixed is not None and share != splits.fixed):
                continue
            left = room.budget - staged_bytes(cost, share)
            held = users * room.kv_rank_bytes
            streamed = 1 - left / held if left < held else 0.0
            rounds = (users * cost.layout.dp) * room.kv_user_bytes * streamed
            tiering = splits.tiering_for(share, streamed)
            fits = rounds + splits.missing_bytes(share) <= room.host
            if left >= 0 and tiering and streamed and fits:
                yield _run(request, cost, room, users, tiering, "stream")


def _too_large(request: Request, splits: _Splits) -> PlanError:
    cost, room, below = splits.cost, splits.room, splits.slower_bytes
    experts = cost.shard.experts_bytes
    need = room.kv_rank_bytes + (staged_bytes(cost, splits.fixed or 0.0) if below else experts)
    what = "one user"
    if experts > room.budget:
        what = "the experts and one user" if not below else "two layers of experts and one user"
    return PlanError(
        f"{request.shape.name} does not fit {cost.layout} of {cost.hardware.name}: {what} of "
        f"{request.workload.context} tokens need {need / GIB:.1f} GiB beside the dense weights of "
        f"each GPU, {room.budget / GIB:.1f} GiB are left, and slower tiers hold "
        f"{below / GIB:.0f} GiB; use more GPUs, a shorter context, narrower KV or weights, or more "
        "host memory"
    )


def _grid(most: int) -> list[int]:
    """1, 2, ... 64, then 3 % apart, up to and with `most`."""
    values, value = [], 1
    while value < most:
        values.append(value)
        value = value + 1 if value < 64 else math.ceil(value * 1.03)
    return [*values, most]


def capacity(cost: CostModel, room: Room, share: float) -> int:
    """Users whose KV fits into HBM in one group, beside that share of the experts."""
    left = room.budget - staged_bytes(cost, share)
    if room.kv_rank_bytes <= 0:
        return 10**9
    return max(0, int(left / room.kv_rank_bytes + 1e-9))  # a share of experts is rounded


def _run(
    request: Request, cost: CostModel, room: Room, users: int, tiering: Tiering, mode: str
) -> Choice:
    """The step of `users` users in the fullest group."""
    workload, dp = request.workload, cost.layout.dp
    running = min(workload.users, users * dp)
    step = cost.decode(users, workload.decode_context, tiering, mean_users=running / dp)
    resident = users * dp if mode == "resident" else 0
    resident = max(resident, capacity(cost, room, tiering.resident_experts) * dp)
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
    return Choice(users, tiering, mode, replace(step, parts=parts), turn, running)


def _turn(request: Request, cost: CostModel, room: Room, resident: int, tiering: Tiering) -> Turn:
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
        again = split_prefix(
            Rates(prefill_rate, {"below": 1 / byte_s}),
            cold,
            ["below"],
            bytes_per_token=bytes_per_token,
            others_run=workload.users > 1,
        ).computed_tokens
        load_s = (cold - again) * bytes_per_token * byte_s
    else:
        again, load_s = 0, 0.0
    again_s = again / prefill_rate if again else 0.0
    # Under load short prompts share a chunk.
    together = max(1, min(workload.users, int(PREFILL_CHUNK // max(1.0, new + again))))
    return Turn(
        found=found,
        recomputed=again,
        load_s=load_s,
        new_s=cost.prefill_s(new, found, tiering),
        again_s=again_s,
        busy_s=cost.prefill_s(new + again, found - again, tiering, sequences=together) / together,
    )
