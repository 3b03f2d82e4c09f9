"""Whether tiering paid, and what experts in host memory cost, each in one sentence."""

from hotset.bench.result import ArmRun, BenchResult

# Relative differences that mean nothing: between single runs, and at least between several.
_NOISE_OF_ONE = 0.05
_LEAST_NOISE = 0.02
_MOST_NOISE = 0.25  # with more than that, nothing can be said


def verdict(result: BenchResult) -> str:
    """Compare the tiered arms with `hot`, and buffered experts with resident ones."""
    tiered = [arm for arm in result.arms if arm in ("host", "host+disk")]
    if "hot-set" in result.arms or any(run.steady for run in result.runs):
        return _of_hot_set(result)
    of_experts = _of_experts(result)
    if "hot" not in result.arms or not tiered:
        return of_experts or _without_comparison(result, tiered)
    return f"{_of_tiers(result, tiered)} {of_experts}".strip()


def _of_hot_set(result: BenchResult) -> str:
    """What requests that turn hot gave."""
    if not {"resident", "hot-set"} <= set(result.arms):
        return "No verdict: compare with --arms resident,hot-set."
    resident, hot = result.typical("resident"), result.typical("hot-set")
    if not (resident.is_complete and hot.is_complete):
        return f"No verdict: {resident.failed + hot.failed} requests failed."
    text = (
        f"`hot-set` made {hot.output_tokens_per_s:,.1f} tokens/s and `resident` "
        f"{resident.output_tokens_per_s:,.1f}: {result.ratio('hot-set', to='resident'):.2f} times "
        "as many"
    )
    if hot.steady and resident.steady:
        one, other = resident.steady[0], hot.steady[0]
        if one["planned"] and other["planned"]:
            ratio = other["planned"]["tokens_per_s"] / one["planned"]["tokens_per_s"]
            text += f" ({ratio:.2f} were planned)"
        text += f", with {other['users']:.0f} users in a step in place of {one['users']:.0f}"
    preemptions = (resident.count("preemptions") or 0) + (hot.count("preemptions") or 0)
    num_hot = hot.count("turned_hot") or 0
    return f"{text}; {num_hot} requests turned hot, {preemptions or 'none'} were preempted."


def _of_tiers(result: BenchResult, tiered: list[str]) -> str:
    hot = result.typical("hot")
    best = result.typical(max(tiered, key=lambda arm: result.ratio(arm) or 0.0))
    if not (hot.is_complete and best.is_complete):
        return (
            f"No verdict: {hot.arm} ended {hot.requests} and {best.arm} {best.requests} requests, "
            f"{hot.failed + best.failed} failed."
        )
    ratio = result.ratio(best.arm) or 0.0
    took = "answered in" if result.is_open_loop else "took"
    each = " on average" if result.is_open_loop else ""
    times = (
        f"`{best.arm}` {took} {result.time_s(best):.2f} s{each} and `hot` "
        f"{'in ' if result.is_open_loop else ''}{result.time_s(hot):.2f} s"
    )
    noise = _noise(result, "hot", best.arm)
    if abs(ratio - 1) > noise:
        if ratio > 1:
            return f"Tiering paid: {times}, {ratio:.2f} times as fast, because {_gain(hot, best)}."
        return f"Tiering cost {1 - ratio:.0%}: {times}, because {_no_gain(hot, best)}."
    if noise > _MOST_NOISE:
        return (
            f"No verdict: {times}, but runs of the same arm differ by up to {noise:.0%}: repeat "
            "on a quiet machine."
        )
    return (
        f"Tiering made no difference: {times} (ratio {ratio:.3f}, within the {noise:.0%} that "
        f"runs differ by), because {_no_gain(hot, best)}."
    )


def _of_experts(result: BenchResult) -> str:
    """What it costs to have some of the experts on the device only; empty if not compared."""
    if not {"resident", "experts"} <= set(result.arms):
        return ""
    all_here, some = result.typical("resident"), result.typical("experts")
    if not (all_here.is_complete and some.is_complete):
        return (
            f"No verdict on experts: {all_here.requests} requests ended with all resident and "
            f"{some.requests} with some."
        )
    ratio = result.ratio("experts", to="resident") or 0.0
    saved = all_here.sizes["experts_device_bytes"] - some.sizes["experts_device_bytes"]
    took = "answered in" if result.is_open_loop else "took"
    times = (
        f"`experts` {took} {result.time_s(some):.2f} s and `resident` "
        f"{result.time_s(all_here):.2f} s"
    )
    noise = _noise(result, "resident", "experts")
    speed = f"{1 / ratio:.2f} times as long" if ratio < 1 else f"{ratio:.2f} times as fast"
    if abs(ratio - 1) <= noise:
        speed = f"the same within the {noise:.0%} that runs differ by"
        if noise > _MOST_NOISE:
            speed = f"but runs of one arm differ by up to {noise:.0%}: repeat on a quiet machine"
    rate = some.engine.get("expert_hit_rate")
    hits = "" if rate is None else f"{rate:.1%} of the experts that were needed were there, and "
    return (
        f"{saved / 1e9:.3g} GB less on the device for experts: {times}, {speed}; {hits}"
        f"{(some.count('expert_bytes') or 0) / 1e9:.3g} GB of experts came from host memory."
    )


def _noise(result: BenchResult, base: str, arm: str) -> float:
    """How far runs of one arm are apart, at most; an assumption where each was run once."""
    all_times = [result.times_s(name) for name in (base, arm)]
    if min(len(times) for times in all_times) < 2:
        return _NOISE_OF_ONE
    return max(_LEAST_NOISE, *(max(times) / min(times) - 1 for times in all_times))


def _without_comparison(result: BenchResult, tiered: list[str]) -> str:
    if not result.runs:
        return "No verdict: no run ended."
    if experts := {"resident", "experts"} & set(result.arms):
        missing = ", ".join(sorted({"resident", "experts"} - experts))
        return (
            f"No verdict: `{missing}` was not run; compare with --arms resident,experts, or with a "
            "call of --arms resident where experts are rounded or on disk."
        )
    missing = "`hot`" if tiered else "`host` or `host+disk`"
    return f"No verdict: {missing} was not run; compare with --arms hot,host."


def fetched_tokens(run: ArmRun) -> int:
    """Tokens that came from a tier below the device: of prompts, or of preempted requests."""
    return _from_below(run, "cached_tokens") + _from_below(run, "resumed_tokens")


def fetched_share(run: ArmRun) -> float:
    """The part of all prompts that came from a tier below the device, 0 to 1."""
    return _from_below(run, "cached_tokens") / max(1, run.prompt_tokens)


def _from_below(run: ArmRun, counter: str) -> int:
    found = run.engine.get(counter, {})
    return int(sum(count for tier, count in found.items() if tier != "device"))


def link_busy_s(run: ArmRun) -> float:
    """Time the link to the device needs for what came over it, at the rate measured at start."""
    rate = run.sizes.get("link_bytes_per_s", {}).get("host")
    moved = run.engine.get("moved_bytes", {}).get("host>device", 0)
    return float(moved / rate) if rate else 0.0


def _gain(hot: ArmRun, best: ArmRun) -> str:
    saved = (hot.count("computed_tokens") or 0) - (best.count("computed_tokens") or 0)
    fetched, part = fetched_tokens(best), fetched_share(best)
    if saved <= 0:
        return "of scheduling, as no fewer tokens were computed" + _preemptions(hot, best)
    share = saved / max(1, hot.count("computed_tokens") or 0)
    reason = f"{saved:,} tokens ({share:.0%}) were not computed again"
    if fetched:
        reason += (
            f", as {fetched:,} ({part:.0%} of the prompts) came from slower tiers in "
            f"{_seconds(link_busy_s(best))} s of the link"
        )
    return reason + _preemptions(hot, best)


def _no_gain(hot: ArmRun, best: ArmRun) -> str:
    hot_tokens = hot.sizes.get("hot_tokens", 0)
    kv_tokens = hot.sizes.get("work_kv_tokens", 0)
    known = hot.sizes.get("work_known_tokens", 0)
    fetched = fetched_tokens(best)
    if kv_tokens and kv_tokens <= hot_tokens:
        why = f"the hot tier of {hot_tokens:,} tokens holds all {kv_tokens:,} of the workload"
    elif not known and not fetched:
        why = "no prompt repeats another, so that nothing was fetched"
    elif not fetched:
        why = (
            f"nothing was fetched, although {known:,} prompt tokens were known: computing them "
            f"was taken to be faster"
        )
    else:
        saved = (hot.count("computed_tokens") or 0) - (best.count("computed_tokens") or 0)
        why = (
            f"{fetched:,} tokens were fetched in {_seconds(link_busy_s(best))} s of the link and "
            f"saved {max(0, saved):,} computed ones"
        )
    return why + _preemptions(hot, best)


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _preemptions(hot: ArmRun, best: ArmRun) -> str:
    one, other = hot.count("preemptions"), best.count("preemptions")
    return f" (preemptions: {one} without tiers, {other} with)" if one or other else ""
