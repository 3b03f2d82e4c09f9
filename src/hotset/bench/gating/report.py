"""Comparisons of gating as text: tables in Markdown that read well in a terminal too."""

from collections.abc import Sequence
from typing import Any

from hotset.units import GIB


def text(result: dict[str, Any]) -> str:
    """All comparisons and where they were made."""
    parts = [f"Static and dynamic gating, {result['device']}, {result['dtype']}"]
    if result["shrunk"]:
        parts.append(result["shrunk"])
    layer = result["layer"]
    parts += ["## One MoE layer", _gating(layer)]
    if model := result.get("model"):
        title = f"## A model of {model['num_layers']} layers, {model['num_moe_layers']} of them MoE"
        length = result["work"]["sequence"]
        parts += [f"{title}: prefill of sequences of {length} tokens", _gating(model)]
    parts.append(
        "E*f/k is how many times the rows that are needed static gating computes. Gating alone is "
        "grouped_mm over the way: both run PyTorch's own products."
    )
    if decode := result.get("decode"):
        parts += ["## Decode, all experts resident", _decode(decode)]
    return "\n\n".join([*parts, _where(result)])


def _where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    hardware = ", ".join(gpu["name"] for gpu in machine["gpus"]) or machine["cpu"]
    return (
        f"{hardware}, {machine['cpu_threads']} CPU threads, torch {machine['versions']['torch']}, "
        f"commit {machine['commit']}, {result['took_s']} s\n\n    {machine['command']}"
    )


def _gating(part: dict[str, Any]) -> str:
    shape = part["shape"]
    rows = [
        (
            "way", "tokens/s", "at batch", "dropped", "E*f/k", "dynamic faster by",
            "gating alone", "peak GiB", "dynamic takes less by", "largest batch",
        )
    ]  # fmt: skip
    for way in part["ways"]:
        if way["best_tokens"] is None:
            rows.append((way["way"], *[""] * 3, _number(way["waste_ef_over_k"]), *[""] * 4,
                         f"none: {way['stopped_by']}"))  # fmt: skip
            continue
        best = next(p for p in way["points"] if p["tokens"] == way["best_tokens"])
        rows.append(
            (
                way["way"],
                f"{way['best_tokens_per_s']:,.0f}",
                str(way["best_tokens"]),
                "" if best["dropped"] is None else f"{best['dropped']:.1%}",
                _number(way["waste_ef_over_k"]),
                _number(way["dynamic_faster_by"]),
                _number(way["gating_alone_faster_by"]),
                f"{(part['weights_bytes'] + best['peak_bytes']) / GIB:,.2f}",
                _number(way["dynamic_takes_less_by"]),
                f"{way['largest_tokens']} ({way['stopped_by']})",
            )
        )
    head = (
        f"E={shape['num_experts']}, d={shape['hidden']}, ffn={shape['ffn']}, "
        f"top-{shape['top_k']}; weights {part['weights_bytes'] / GIB:.2f} GiB, which the peak has"
    )
    return f"{head}\n\n{_table(rows)}"


def _decode(part: dict[str, Any]) -> str:
    shape = part["shape"]
    rows = [("way", "launched, ms", "dynamic faster by", "CUDA graph, ms", "dynamic faster by",
             "weights read, GB/s", "")]  # fmt: skip
    for way in part["ways"]:
        eager, graph = way["eager"], way["graph"]
        fastest = graph or eager
        rows.append(
            (
                way["way"],
                "" if eager is None else f"{eager['p50_ms']:.3f}",
                _number(way["dynamic_faster_by_eager"]),
                "" if graph is None else f"{graph['p50_ms']:.3f}",
                _number(way["dynamic_faster_by_graph"]),
                "" if fastest is None else f"{fastest['weights_gb_per_s']:,.0f}",
                way["why_not"] or "",
            )
        )
    head = (
        f"{part['tokens']} tokens, E={shape['num_experts']}, H={shape['hidden']}, "
        f"I={shape['ffn']}, top-{shape['top_k']}: {part['distinct_experts']} experts are used"
    )
    return f"{head}\n\n{_table(rows)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
