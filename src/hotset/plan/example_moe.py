"""A quoted figure, taken apart: about 7.8 times from the layout of an MoE model.

It has no public derivation. What follows are three ways to its size, and what each takes; it does
not claim to be what its authors did.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from hotset.cost.catalog import load_model
from hotset.cost.hardware import Hardware, load_hardware
from hotset.cost.step_time import Tiering
from hotset.errors import PlanError
from hotset.layout import parse_layout
from hotset.plan.compare import compare_plans
from hotset.plan.expert_links import links_lines
from hotset.plan.planner import make_plan
from hotset.plan.result import Plan
from hotset.plan.text import rows, seconds
from hotset.plan.workload import Request, Workload

MOST_USERS_A_GPU = 256  # decode batch of one rank in the wide layout, as DeepSeek and SGLang run it


@dataclass(frozen=True)
class _Case:
    """Users that fill a layout, up to a cap for each GPU, and the plan for them."""

    plan: Plan

    @property
    def rate(self) -> float:
        return self.plan.tokens_per_s / self.plan.gpus


def _filled(request: Request, layout: str) -> _Case | None:
    """As many users as HBM holds, all weights resident; None where not even one fits."""
    parsed = parse_layout(layout)
    probe = replace(request, layout=parsed, workload=replace(request.workload, users=1))
    try:
        room = make_plan(probe).users_resident
    except PlanError:
        return None
    users = max(1, min(room, MOST_USERS_A_GPU * parsed.gpus))
    return _Case(make_plan(replace(probe, workload=replace(request.workload, users=users))))


def _v3(hardware: Hardware, context: int, **more: Any) -> Request:
    return Request(
        load_model("deepseek-v3"),
        hardware.with_tiers(host_gib=0, disk_gib=0),
        Workload(context=context),
        **more,
    )


def moe_example() -> tuple[str, dict[str, object]]:
    """Three ways to about 7.8 times: the text, and its figures."""
    h200 = load_hardware("h200")
    data: dict[str, object] = {}
    text = [
        "About 7.8x from several GPUs: one resource was the limit, and eight GPUs have it eight",
        "times, less 2 to 3 %. There are three ways to it; all figures but those named as measured",
        "are from the model.",
        "",
        *links_lines(h200, data),
        "",
        "2. KV copies of MLA: DeepSeek-V3, FP8 weights, BF16 KV, H200",
        "   A: tensor parallel over 8 GPUs (tp=8). MLA keeps one latent per token; each rank needs",
        "      all of it: 8 copies of the KV.",
        "   B: wide expert parallel with data-parallel attention (ep=72). One copy; 4 of 288",
        "      expert slots per GPU instead of an eighth of all 256.",
        *_moe_capacity(h200, data),
        *_moe_filled(h200, data),
        *_moe_split(h200, data),
        "",
        *_moe_on_host(h200, data),
        "",
        *_moe_one_node(h200, data),
        "",
        "So 7.8x is an ordinary value where one resource is the limit, not a property of MoE.",
    ]
    return "\n".join(text), data


def _moe_capacity(h200: Hardware, data: dict[str, object]) -> list[str]:
    a, b = (_filled(_v3(h200, 4096), layout) for layout in ("tp=8", "ep=72"))
    assert a and b
    tokens = [c.plan.users_resident * 4096 for c in (a, b)]
    ratio = tokens[1] / (9 * tokens[0])
    data["kv_capacity_ratio"] = ratio
    return [
        "   Capacity comes first:",
        f"   A holds {tokens[0] / 1e3:,.0f} k tokens on 8 GPUs, B {tokens[1] / 1e6:,.1f} M on 72: "
        f"{ratio:.1f}x for the same 72 GPUs.",
    ]


def _moe_filled(h200: Hardware, data: dict[str, object]) -> list[str]:
    nvl = replace(h200, name="h200 on one NVLink domain", peer_gpus=72)
    table: list[tuple[str, ...]] = [
        ("context", "A", "B on IB", "ratio", "TPOT A", "TPOT B", "B on NVLink", "ratio")
    ]
    found: list[dict[str, float]] = []
    for context in (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536):
        base = _filled(_v3(h200, context), "tp=8")
        wide = _filled(_v3(h200, context), "ep=72")
        fast = _filled(_v3(nvl, context, overlap=frozenset({"comm"})), "ep=72")
        if not (base and wide and fast):
            continue
        entry = {
            "context": context,
            "ib_serial": wide.rate / base.rate,
            "nvlink_overlapped": fast.rate / base.rate,
        }
        found.append(entry)
        table.append(
            (
                f"{context:,}",
                f"{base.rate:,.0f}",
                f"{wide.rate:,.0f}",
                f"{entry['ib_serial']:.1f}x",
                seconds(base.plan.step.expected_s),
                seconds(wide.plan.step.expected_s),
                f"{fast.rate:,.0f}",
                f"{entry['nvlink_overlapped']:.1f}x",
            )
        )
    data["filled"] = found
    near = [int(e["context"]) for e in found if 6.6 <= e["ib_serial"] <= 9.0]
    near_fast = [int(e["context"]) for e in found if 6.6 <= e["nvlink_overlapped"] <= 9.0]
    return [
        "   Tokens/s per GPU, both layouts filled (B up to 256 users per GPU), routing uniform.",
        "   IB: 50 GB/s per GPU, nothing overlapped. NVLink: 450 GB/s, collectives hidden.",
        rows(table, "   "),
        f"   Within 15 % of 7.8x: {_contexts(near)} on IB, {_contexts(near_fast)} on NVLink.",
    ]


def _moe_split(h200: Hardware, data: dict[str, object]) -> list[str]:
    base, wide = (_filled(_v3(h200, 8192), layout) for layout in ("tp=8", "ep=72"))
    assert base and wide
    [split] = compare_plans(["A", "B"], [base.plan, wide.plan])
    data["split_at_8192"] = asdict(split)
    return [
        "   What it is made of, at 8,192 tokens on IB:",
        f"   {split.tokens_per_s_per_gpu:.1f}x = {split.capacity:.1f}x from capacity (more users "
        f"at once) times {split.speed:.2f}x from speed (equal users per GPU).",
    ]


def _moe_one_node(h200: Hardware, data: dict[str, object]) -> list[str]:
    layouts = ("tp=8", "dp=8,ep=8")
    node: list[tuple[str, ...]] = [
        ("context", "tp=8 runs", "tok/s", "dp=8,ep=8 runs", "tok/s", "ratio")
    ]
    inside = []
    for context in (1500, 2048, 4096, 8192):
        load = replace(_v3(h200, context), workload=Workload(users=256, context=context))
        p, q = (make_plan(replace(load, layout=parse_layout(x))) for x in layouts)
        inside.append({"context": context, "ratio": q.tokens_per_s / p.tokens_per_s})
        node.append(
            (
                f"{context:,}",
                f"{p.users_running}",
                f"{p.tokens_per_s:,.0f}",
                f"{q.users_running}",
                f"{q.tokens_per_s:,.0f}",
                f"{q.tokens_per_s / p.tokens_per_s:.1f}x",
            )
        )
    data["one_node"] = inside
    load = replace(_v3(h200, 2048), workload=Workload(users=8, context=2048))
    few = [make_plan(replace(load, layout=parse_layout(x))) for x in layouts]
    data["one_node_8_users"] = few[1].tokens_per_s / few[0].tokens_per_s
    return [
        "4. When it is not so",
        "   One node, 256 users: the layout alone gives far less.",
        rows(node, "   "),
        f"   8 users of 2,048 tokens on one node: {data['one_node_8_users']:.2f}x, that is, tensor "
        "parallel is faster.",
        "   Also not: with GQA instead of MLA (tensor parallel copies only beyond the KV heads);",
        "   against a baseline that shards the context (decode context parallel); with skewed",
        "   routing (--expert-histogram) or uneven users; or at equal TPOT, if B's is the longer.",
    ]


def _moe_on_host(h200: Hardware, data: dict[str, object]) -> list[str]:
    table: list[tuple[str, ...]] = [("link", "context", "tp=8", "dp=8,ep=8", "ratio")]
    streamed = []
    for link in ("c2c", "pcie5"):
        for context in (32_768, 131_072):
            hardware = h200.with_link(link)
            if link == "c2c":  # a Grace with its own DRAM for each GPU
                hardware = replace(hardware, gpus_per_host=1, host_memory_bytes_per_s=512e9)
            pair = [_streamed(hardware, x, context) for x in ("tp=8", "dp=8,ep=8")]
            streamed.append({"link": link, "context": context, "ratio": pair[1] / pair[0]})
            table.append(
                (
                    link,
                    f"{context:,}",
                    *(f"{r:,.0f} tok/s" for r in pair),
                    f"{pair[1] / pair[0]:.1f}x",
                )
            )
    data["kv_on_host"] = streamed
    return [
        "3. KV that does not fit is read from the host each step: DeepSeek-V3, as above",
        rows(table, "   "),
        "   256 users on 8 GPUs, all in each step. Eight copies cross the link in one case",
        "   and one in the other, so the ratio tends to 8 as the link takes all the time, and is",
        "   above 8 where more of the KV is resident. Assumes hosts that hold it all; PCIe 5 with",
        "   614 GB/s of DRAM for 8 GPUs, C2C with 512 GB/s for each.",
    ]


def _contexts(values: list[int]) -> str:
    return ", ".join(f"{v:,.0f}" for v in values) + " tokens" if values else "nowhere"


def _streamed(hardware: Hardware, layout: str, context: int) -> float:
    """Tokens/s of 256 users whose KV beyond HBM is read over the link in every step."""
    request = _v3(hardware, context)
    plan = make_plan(
        replace(request, workload=Workload(1, 1024), layout=parse_layout(layout), expert_slots=256)
    )
    cost, dp = plan.cost, plan.layout.dp
    hbm = plan.hbm_bytes - plan.workspace_bytes - plan.reserve_bytes
    hbm -= plan.resident_weights_bytes + plan.resident_experts_bytes
    held = 256 / dp * request.shape.kv_bytes(context, "bf16", tp=plan.layout.tp)
    share = max(0.0, 1 - hbm / plan.gpus / held)
    return 256 / cost.decode(256 / dp, context, Tiering(host_kv=share)).expected_s
