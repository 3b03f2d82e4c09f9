"""Two quoted figures, taken apart: under which stated assumptions they come out, and when not.

Neither "7.8x for MoE" nor "3x at 256 concurrent requests" has a public derivation. What follows
reproduces their size, and says what it takes; it does not claim to be what their authors did.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hotset.cost.catalog import load_model
from hotset.cost.hardware import Hardware, load_hardware
from hotset.cost.layout import parse_layout
from hotset.cost.step_time import Tiering
from hotset.errors import PlanError
from hotset.plan.compare import compare_plans, rate_at
from hotset.plan.planner import make_plan
from hotset.plan.result import Plan
from hotset.plan.text import gb, rows, seconds
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
    """One MoE layout about 7.8 times another: the text, and its figures."""
    h200 = load_hardware("h200")
    data: dict[str, object] = {}
    text = [
        "About 7.8x from the layout of an MoE model: DeepSeek-V3, FP8 weights, BF16 KV, H200",
        "",
        "A: tensor parallel over 8 GPUs (tp=8). MLA keeps one latent per token; each rank needs",
        "   all of it: 8 copies of the KV.",
        "B: wide expert parallel with data-parallel attention (ep=72). One copy; 4 of 288 expert",
        "   slots per GPU instead of an eighth of all 256.",
        "",
        *_moe_capacity(h200, data),
        "",
        *_moe_filled(h200, data),
        "",
        *_moe_split(h200, data),
        "",
        *_moe_one_node(h200, data),
        "",
        *_moe_on_host(h200, data),
        "",
        "So 7.8x is an ordinary value of such a comparison, not a property of MoE. It needs MLA, a",
        "baseline that copies KV eight times, contexts long enough to fill it, and many users.",
    ]
    return "\n".join(text), data


def _moe_capacity(h200: Hardware, data: dict[str, object]) -> list[str]:
    a, b = (_filled(_v3(h200, 4096), layout) for layout in ("tp=8", "ep=72"))
    assert a and b
    tokens = [c.plan.users_resident * 4096 for c in (a, b)]
    ratio = tokens[1] / (9 * tokens[0])
    data["kv_capacity_ratio"] = ratio
    return [
        "1. Capacity comes first",
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
        "2. Tokens/s per GPU, both layouts filled (B up to 256 users per GPU), routing uniform",
        "   IB: 50 GB/s per GPU, nothing overlapped. NVLink: 450 GB/s, collectives hidden.",
        rows(table, "   "),
        f"   Within 15 % of 7.8x: {_contexts(near)} on IB, {_contexts(near_fast)} on NVLink.",
    ]


def _moe_split(h200: Hardware, data: dict[str, object]) -> list[str]:
    base, wide = (_filled(_v3(h200, 8192), layout) for layout in ("tp=8", "ep=72"))
    assert base and wide
    [split] = compare_plans(["A", "B"], [base.plan, wide.plan])
    data["split_at_8192"] = split.as_dict()
    return [
        "3. What it is made of, at 8,192 tokens on IB",
        f"   {split.total:.1f}x = {split.capacity:.1f}x from capacity (more users at once) times "
        f"{split.speed:.2f}x from speed (equal users per GPU).",
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
        "5. A second honest way to about 8x: KV that does not fit is read from the host each step",
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


@dataclass(frozen=True)
class _Offload:
    """256 users with prompts of 4,096 tokens and answers of 64, on one H100, with and without."""

    chips: Hardware
    base_request: Request
    base: Plan  # without tiers
    prompt: int = 4096

    @property
    def kv_per_token(self) -> int:
        return self.base_request.shape.kv_bytes_per_token("bf16")

    @property
    def prefill_s(self) -> float:
        return self.base.cost.prefill_s(self.prompt)

    def with_reuse(self, hit: float, link: str = "pcie5", workload: Workload | None = None) -> Plan:
        """The plan with host memory, where `hit` of each prompt is found."""
        request = self.base_request
        hardware = replace(self.chips.with_link(link), host_bytes=2e12, disk_bytes=0.0)
        workload = replace(workload or request.workload, reuse=hit)
        return make_plan(replace(request, hardware=hardware, workload=workload, host_given=True))


def offload_example() -> tuple[str, dict[str, object]]:
    """KV offload that gives 3x at 256 concurrent requests: the text, and its figures."""
    chips = load_hardware("h100-sxm")
    shape = load_model("llama-3-8b")
    prompt, output = 4096, 64
    load = Workload(users=256, context=prompt + output, output=output)
    hardware = chips.with_tiers(host_gib=0, disk_gib=0)
    request = Request(shape, hardware, load, parse_layout("tp=1"))
    case = _Offload(chips, request, make_plan(request), prompt)
    data: dict[str, object] = {}
    text = [
        "3x at 256 concurrent requests from KV offload: Llama-3-8B, one H100 SXM",
        f"   256 users, prompts of {prompt:,} tokens, answers of {output}. Offload finds a",
        "   share of each prompt (the hit rate) in host memory and loads what it found.",
        "",
        *_offload_prompt(case, data),
        "",
        *_offload_by_hit(case, data),
        "",
        *_offload_by_answer(case, data),
        "",
        *_offload_losses(case, data),
    ]
    return "\n".join(text), data


def _offload_prompt(case: _Offload, data: dict[str, object]) -> list[str]:
    prompt, kv, prefill_s = case.prompt, case.kv_per_token, case.prefill_s
    link = case.with_reuse(1.0).cost.link_bytes_per_s()
    load_s = prompt * kv / link
    r = load_s / prefill_s
    need = (1 - 1 / 3) / (1 - r) if r < 1 else 0.0
    data["load_over_prefill"] = r
    data["hit_for_3x_prompt_only"] = need
    return [
        "1. The most there is to gain, for the prompt alone",
        f"   computing it:  {prompt:,} tokens take {seconds(prefill_s)}",
        f"   loading it:    {prompt:,} x {kv:,} B = {gb(prompt * kv)} over "
        f"{link / 1e9:.0f} GB/s take {seconds(load_s)}, r = {r:.3f}",
        f"   so at most {prefill_s / load_s:.1f}x, and S(hit) = 1 / (1 - hit (1 - r)):",
        "   "
        + ", ".join(f"hit {h:.0%} {1 / (1 - h * (1 - r)):.2f}x" for h in (0.25, 0.5, 0.75, 0.9))
        + f"; 3x needs hit {need:.0%}.",
    ]


def _offload_by_hit(case: _Offload, data: dict[str, object]) -> list[str]:
    base = case.base
    links = ("pcie4", "pcie5", "c2c")
    table: list[tuple[str, ...]] = [("hit rate", *links)]
    grid: list[dict[str, float]] = []
    for hit in (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0):
        gains = {
            link: case.with_reuse(hit, link).tokens_per_s / base.tokens_per_s for link in links
        }
        grid.append({"hit": hit, **gains})
        table.append((f"{hit:.0%}", *(f"{gains[link]:.2f}x" for link in links)))
    data["by_hit_rate"] = grid
    share = base.step.parts["prefill"] / base.step.expected_s
    data["prefill_share"] = share
    return [
        "2. Decoding is not sped up, so the whole gains less: requests/s by hit rate and link",
        rows(table, "   "),
        f"   Without offload {share:.0%} of the time is prefill, so no link or hit rate gives "
        f"more than {1 / (1 - share):.1f}x here.",
    ]


def _offload_by_answer(case: _Offload, data: dict[str, object]) -> list[str]:
    table: list[tuple[str, ...]] = [("answer", "prefill's share", "hit needed for 3x")]
    needed: list[dict[str, float | None]] = []
    for answer in (1, 16, 64, 256, 1024):
        this = Workload(users=256, context=case.prompt + answer, output=answer)
        start = make_plan(replace(case.base_request, workload=this))
        part = start.step.parts["prefill"] / start.step.expected_s
        least = _hit_for(3.0, start.tokens_per_s, partial(case.with_reuse, workload=this))
        needed.append({"output": answer, "prefill_share": part, "hit": least})
        shown = "out of reach" if least is None else f"{least:.0%}"
        table.append((f"{answer:,}", f"{part:.0%}", shown))
    data["hit_for_3x"] = needed
    return [
        "3. How long the answers may be: reuse needed for 3x (PCIe 5)",
        rows(table, "   "),
    ]


def _offload_losses(case: _Offload, data: dict[str, object]) -> list[str]:
    slow = case.prompt * case.kv_per_token / case.prefill_s / 1e9
    data["break_even_gb_per_s"] = slow
    none = case.with_reuse(0.0)
    data["gain_without_reuse"] = none.tokens_per_s / case.base.tokens_per_s
    return [
        "4. When offload loses or does not help",
        f"   Link: below {slow:.1f} GB/s loading takes longer than computing. An engine that only",
        "   loads then loses; hotset compares the two and splits the prefix, so it does not.",
        f"   Hit rate 0: {data['gain_without_reuse']:.2f}x at best; the copies down cost the link "
        "time that loads would need,",
        "   and engines that make them on the critical path have reported 3 to 15 % less.",
        f"   All in HBM: {case.base.users_resident} of 256 users fit here; where all fit and come "
        "back soon,",
        "   their prefixes are found in HBM anyway and offload adds nothing.",
        "   Each step: reading offloaded KV again for every token instead of once for every turn.",
        f"   {_per_step(case.base, case.chips)}",
    ]


def _hit_for(gain: float, base: float, plan_for: Callable[[float], Plan]) -> float | None:
    """Smallest hit rate, to 1 %, that gives `gain`; None if none does."""
    if plan_for(1.0).tokens_per_s < gain * base:
        return None
    low, high = 0.0, 1.0
    while high - low > 0.005:
        middle = (low + high) / 2
        if plan_for(middle).tokens_per_s >= gain * base:
            high = middle
        else:
            low = middle
    return high


def _per_step(base: Plan, chips: Hardware) -> str:
    context = base.request.workload.context
    kv = base.request.shape.kv_bytes(context, "bf16")
    rate = base.cost.link_bytes_per_s()
    c2c = chips.with_link("c2c").host_link_bytes_per_s
    return (
        f"One user's {gb(kv)} per step is {1 / (kv / rate):,.0f} tok/s over PCIe 5, "
        f"{1 / (kv / c2c):,.0f} over C2C, for all users together; HBM gives "
        f"{rate_at(base, 64):,.0f}."
    )
