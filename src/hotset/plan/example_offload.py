"""A quoted figure, taken apart: 3 times at 256 concurrent requests from offloading KV.

Two mechanisms reach it. The published one keeps the hottest tokens of each request of a sparse
model on the GPU, with the prefix cache off (LMSYS, "HiSparse", 2026-04-10). The other finds
prefixes again instead of computing them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from hotset.cost.catalog import load_model
from hotset.cost.hardware import Hardware, load_hardware
from hotset.cost.hot_plan import HotPlan, plan_hot_set
from hotset.cost.selection import DrawnSelections
from hotset.layout import parse_layout
from hotset.plan.compare import rate_at
from hotset.plan.planner import make_plan
from hotset.plan.result import Plan
from hotset.plan.text import gb, rows, seconds
from hotset.plan.workload import Request, Workload


def offload_example() -> tuple[str, dict[str, object]]:
    """Both ways to 3x at 256 concurrent requests: the text, and its figures."""
    hot_text, hot_data = _hot_set_example()
    prefix_text, prefix_data = _prefix_example()
    return f"{hot_text}\n\n\n{prefix_text}", {**prefix_data, "hot_set": hot_data}


_PUBLISHED_SLOTS = 4096


def _hot_set_example() -> tuple[str, dict[str, object]]:
    """The published case: GLM-5.1-FP8 on 8 H200, 32k in and 8k out."""
    shape = replace(load_model("glm-5.1", "fp8"), index_dtype="fp8")
    load = Workload(users=256, context=40 * 1024, output=8 * 1024)
    request = Request(shape, load_hardware("h200"), load, parse_layout("dp=8,ep=8"))
    plan = make_plan(request)
    assert plan.hot_set
    data: dict[str, object] = {}
    text = [
        "A. 3x at 256 concurrent requests from the hot set of each request: GLM-5.1-FP8, 8 H200",
        "   32,768 tokens in, 8,192 out, prefix cache off, one request's attention on one GPU. A",
        "   step selects 2,048 tokens per layer. All KV of a hot request is in host memory, and",
        "   the GPU keeps the rows it used last: 4,096 per layer (LMSYS, HiSparse, 2026-04-10).",
        "",
        *_hot_bytes(plan, plan.hot_set, data),
        "",
        *_hot_steps(plan.hot_set, data),
        "",
        *_hot_losses(request),
    ]
    return "\n".join(text), data


def _hot_bytes(plan: Plan, hot: HotPlan, data: dict[str, object]) -> list[str]:
    cost, context = hot.cost, hot.cost.context
    resident = cost.cache.resident_bytes(context)
    small = cost.cache.hot_bytes(context, _PUBLISHED_SLOTS)
    here = cost.most_users(hot.room, _PUBLISHED_SLOTS)
    elsewhere = cost.most_users(replace(hot.room, has_prompts=False), _PUBLISHED_SLOTS)
    users = cost.resident_users(hot.room)
    data["bytes"] = {"resident": resident, "hot": small}
    data["users_per_gpu"] = {"resident": users, "hot": elsewhere, "hot_and_prompts": here}
    weights = plan.cost.shard.dense_bytes + plan.cost.shard.experts_bytes
    return [
        "1. What fits one GPU",
        f"   Weights take {gb(weights)} and leave {gb(hot.room.device_bytes)} for KV.",
        f"   A resident request of {context:,.0f} tokens takes {gb(resident)}: {users} fit; "
        "SGLang ran 2.",
        f"   A hot one takes {gb(small)}: {elsewhere} fit where other GPUs compute the prompts, as",
        f"   SGLang had it; {here} where these GPUs do, which takes a resident request's room.",
    ]


def _hot_steps(hot: HotPlan, data: dict[str, object]) -> list[str]:
    table: list[tuple[str, ...]] = [
        ("overlap", "slots", "users", "misses", "step", "link", "tokens/s", "gain")
    ]
    found: list[dict[str, float]] = []
    resident = hot.resident
    assert resident
    table.append(
        (
            "all resident",
            "",
            f"{8 * resident.users}",
            "",
            seconds(resident.seconds),
            "",
            f"{8 * resident.tokens_per_s:,.0f}",
            "1.0x",
        )
    )
    for overlap in (0.35, 0.4, 0.5):
        cost = replace(hot.cost, selections=DrawnSelections(overlap))
        for slots in (_PUBLISHED_SLOTS, 2 * _PUBLISHED_SLOTS):
            room = replace(hot.room, has_prompts=False)
            best = plan_hot_set(cost, room, 32, slots=slots)
            assert best and best.gain
            found.append({"overlap": overlap, "slots": best.slots, "gain": best.gain})
            table.append(
                (
                    f"{overlap:.2f}",
                    f"{best.slots:,}",
                    f"{8 * best.hot.users}",
                    f"{best.rows.missed:,.0f}",
                    seconds(best.hot.seconds),
                    seconds(best.hot.link_s),
                    f"{8 * best.hot.tokens_per_s:,.0f}",
                    f"{best.gain:.1f}x",
                )
            )
    data["steps"] = found
    rate = f"{hot.cost.rows_bytes_per_s / 1e9:.0f} GB/s"
    return [
        "2. Steps of the node, prompts elsewhere, by overlap and by slots per layer",
        rows(table, "   "),
        f"   Published: over 3x. Missed rows come at {rate}, as measured on an H200. The",
        "   overlap of neighbouring selections is assumed; on DeepSeek-V3.2 it was 0.35 to 0.50.",
    ]


def _hot_losses(request: Request) -> list[str]:
    few = make_plan(replace(request, workload=replace(request.workload, users=16)))
    short = make_plan(replace(request, workload=Workload(users=256, context=8192, output=1024)))
    assert few.hot_set and short.hot_set and short.hot_set.gain
    return [
        "3. When it does not help",
        f"   16 users: all {few.users_resident} are resident.",
        f"   Contexts of 8,192 tokens: {short.users_resident} are resident, and hot ones give "
        f"{short.hot_set.gain:.2f}x.",
        "   A bound on the time per token (--tpot-ms): more users make a step longer for each.",
        "   A model without an indexer: each step would read all KV over the link.",
    ]


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


def _prefix_example() -> tuple[str, dict[str, object]]:
    """KV offload that gives 3x by finding prefixes: the text, and its figures."""
    chips = load_hardware("h100-sxm")
    shape = load_model("llama-3-8b")
    prompt, output = 4096, 64
    load = Workload(users=256, context=prompt + output, output=output)
    hardware = chips.with_tiers(host_gib=0, disk_gib=0)
    request = Request(shape, hardware, load, parse_layout("tp=1"))
    case = _Offload(chips, request, make_plan(request), prompt)
    data: dict[str, object] = {}
    text = [
        "B. 3x at 256 concurrent requests from prefixes found again: Llama-3-8B, one H100 SXM",
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
