r"""Predicted against measured: published rows, and steps of this engine where there are some.

    python benchmarks/planner_validation.py
    python benchmarks/planner_validation.py --measured benchmarks/results/engine_steps.json \
        benchmarks/results/latent_steps_h200.json --out benchmarks/results/planner_validation.json

Three constants of `hotset.cost.calibration.Calibration` are fitted, on rows 14 and 16 alone; the
others come from measurements of links and from papers. Errors are printed with their sign:
positive means that the prediction is too fast (more tokens/s, or less time, than measured).
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import record

from hotset.cost.attention import Kind
from hotset.cost.calibration import CALIBRATIONS, Calibration
from hotset.cost.catalog import bundled_config, load_model
from hotset.cost.families import shape_from_config
from hotset.cost.hardware import Hardware, load_hardware
from hotset.cost.routing import Routing
from hotset.cost.shape import ModelShape
from hotset.cost.step_time import CostModel
from hotset.layout import Layout, parse_layout
from hotset.plan.planner import make_plan
from hotset.plan.workload import Request, Workload

# Row 16: Llama-3.1-8B on one H100, one user, ITL = intercept + slope * n (vLLM blog, 2026-04-22).
# The intercepts of both agree, so only KV is FP8 in the second; weights are BF16 in both.
ROW_16 = (("bf16", 6.44e-3, 4.37e-8), ("fp8", 6.58e-3, 2.37e-8))

# Row 14: Llama-3.1-70B FP8 on H200, TensorRT-LLM: layout, users, TPOT. Lengths of prompts and
# answers are not given; 1k/1k as in row 11 of the same source, and FP8 KV, as NVIDIA's FP8
# checkpoint sets.
ROW_14 = (("tp=2", 64, 19.0e-3), ("tp=4", 128, 19.3e-3), ("tp=8", 64, 13.5e-3))

# Row 11: DeepSeek-R1 FP8 on 8 H200, SGLang 0.5.9, TP8, 1k/1k: users, TPOT.
ROW_11 = ((4, 10.3e-3), (8, 12.5e-3), (16, 16.6e-3), (32, 23.3e-3), (64, 33.0e-3))


@dataclass(frozen=True)
class Row:
    """One measurement. `value` is tokens/s of a GPU, or seconds a token if `is_time`."""

    row: str
    what: str
    value: float
    predicted: float
    is_time: bool
    fitted: bool

    @property
    def error(self) -> float:
        """Signed and relative, positive where the prediction is too fast."""
        speed = self.value / self.predicted if self.is_time else self.predicted / self.value
        return speed - 1


def h800() -> Hardware:
    """An H800: an H100 with NVLink cut to 400 GB/s both ways (NVIDIA H800 datasheet)."""
    return replace(load_hardware("h100-sxm"), name="h800", peer_bytes_per_s=200e9)


def tpot(
    model: ModelShape, hardware: Hardware, layout: str, kv: str, load: Workload, c: Calibration
) -> float:
    request = Request(model, hardware, load, parse_layout(layout), kv_dtype=kv, calibration=c)
    return make_plan(request).step.expected_s


def fit() -> Calibration:
    """Memory efficiency, kernel time and time per user, one after the other, on rows 14 and 16."""
    model, hardware = load_model("llama-3-8b"), load_hardware("h100-sxm")
    start = Calibration(user_s=0.0, kernel_s=0.0)
    reached = [
        model.kv_bytes_per_token(kv) / slope / hardware.hbm_bytes_per_s for kv, _, slope in ROW_16
    ]
    c = replace(start, memory_efficiency=round(sum(reached) / len(reached), 3))
    cost = CostModel(model, hardware, Layout(), "bf16", c, Routing())
    weights_s = cost.decode(1, 0).expected_s
    intercept_s = sum(row[1] for row in ROW_16) / len(ROW_16)
    kernels = sum(layer.num_kernels for layer in model.layers) + 4
    c = replace(c, kernel_s=round((intercept_s - weights_s) / kernels, 8))
    big, h200 = load_model("llama-3-70b").with_weights("fp8"), load_hardware("h200")
    above = below = 0.0
    for layout, users, measured in ROW_14:
        load = Workload(users=users, context=2048, output=1024)
        left = measured - tpot(big, h200, layout, "fp8", load, c)
        above += users * left / measured**2  # least squares of the relative error
        below += users**2 / measured**2
    return replace(c, user_s=round(max(0.0, above / below), 7))


def published(c: Calibration) -> list[Row]:
    """Every row of the table that says enough to be predicted."""
    rows: list[Row] = []
    small, h100 = load_model("llama-3-8b"), load_hardware("h100-sxm")
    for kv, intercept_s, slope_s in ROW_16:
        for n in (1_000, 32_000, 125_000):
            predicted = tpot(small, h100, "tp=1", kv, Workload(users=1, context=n), c)
            measured = intercept_s + slope_s * n
            rows.append(
                Row("16", f"Llama-3.1-8B H100, {kv} KV, n={n}", measured, predicted, True, True)
            )
    big, h200 = load_model("llama-3-70b").with_weights("fp8"), load_hardware("h200")
    for layout, users, measured in ROW_14:
        load = Workload(users=users, context=2048, output=1024)
        predicted = tpot(big, h200, layout, "fp8", load, c)
        rows.append(
            Row("14", f"Llama-3.1-70B FP8 H200 {layout} c={users}", measured, predicted, True, True)
        )
    v3 = load_model("deepseek-v3")
    for users, measured in ROW_11:
        load = Workload(users=users, context=2048, output=1024)
        predicted = tpot(v3, h200, "tp=8", "bf16", load, c)
        rows.append(Row("11", f"R1 FP8 8xH200 tp=8 c={users}", measured, predicted, True, False))
    for row, hardware, layout, users, context, measured in (
        ("1", h800(), "ep=144", 88 * 144, 4989, 1850.0),
        ("3", h100, "ep=72", 256 * 72, 2048, 2785.0),
    ):
        load = Workload(users=users, context=context)
        plan = make_plan(Request(v3, hardware, load, parse_layout(layout), calibration=c))
        what = f"V3 {hardware.name} {layout}, {plan.users_running // plan.gpus} users per GPU"
        rows.append(Row(row, what, measured, plan.tokens_per_s / plan.gpus, False, False))
    for context, measured in ((2048, 52.3e3 / 8), (4096, 50.3e3 / 8)):
        rate = prefill_rate(v3, h100, "ep=32", context, c)
        rows.append(Row("4", f"V3 H100 prefill ep=32, {context} in", measured, rate, False, False))
    return rows


def prefill_rate(
    model: ModelShape, hardware: Hardware, layout: str, context: int, c: Calibration
) -> float:
    """Prompt tokens/s of a GPU with full chunks of prompts of `context` tokens."""
    parsed = parse_layout(layout)
    cost = CostModel(model, hardware, parsed, "bf16", c, Routing())
    together = max(1, 8192 // context)
    seconds = cost.prefill_s(context, sequences=together)
    return together * context / seconds / parsed.tp


def rankings(c: Calibration) -> list[dict[str, object]]:
    """Layouts measured against each other, and whether the plan orders them alike."""
    big, h200 = load_model("llama-3-70b").with_weights("fp8"), load_hardware("h200")
    v3, h100 = load_model("deepseek-v3"), load_hardware("h100-sxm")
    result: list[dict[str, object]] = []
    measured = {f"{layout} c={users}": users / s for layout, users, s in ROW_14}
    predicted = {}
    for layout, users, _ in ROW_14:
        load = Workload(users=users, context=2048, output=1024)
        predicted[f"{layout} c={users}"] = users / tpot(big, h200, layout, "fp8", load, c)
    result.append(_ranking("14: tokens/s of the node share, Llama-3.1-70B", measured, predicted))
    wide = make_plan(
        Request(v3, h100, Workload(256 * 72, 2048), parse_layout("ep=72"), calibration=c)
    )
    base = make_plan(Request(v3, h100, Workload(4096, 2048), parse_layout("tp=16"), calibration=c))
    result.append(
        _ranking(
            "3: decode, ep=72 over tp=16, measured as 'up to 5x'",
            {"ep=72": 5.0, "tp=16": 1.0},
            {
                "ep=72": wide.tokens_per_s / wide.gpus / (base.tokens_per_s / base.gpus),
                "tp=16": 1.0,
            },
        )
    )
    rate = prefill_rate(v3, h100, "ep=32", 2048, c) / prefill_rate(v3, h100, "tp=16", 2048, c)
    result.append(
        _ranking(
            "4: prefill, ep=32 over tp=16, measured as 'up to 3.3x'",
            {"ep=32": 3.3, "tp=16": 1.0},
            {"ep=32": rate, "tp=16": 1.0},
        )
    )
    return result


def _ranking(
    what: str, measured: dict[str, float], predicted: dict[str, float]
) -> dict[str, object]:
    def order(values: dict[str, float]) -> list[str]:
        return sorted(values, key=lambda name: -values[name])

    return {
        "what": what,
        "measured": measured,
        "predicted": predicted,
        "ranked_right": order(measured) == order(predicted),
    }


def summary(rows: list[Row]) -> dict[str, float]:
    errors = [row.error for row in rows]
    return {
        "rows": len(rows),
        "mean_absolute_error": sum(map(abs, errors)) / len(errors),
        "mean_signed_error": sum(errors) / len(errors),
        "largest": max(errors, key=abs),
        "within_20_percent": sum(abs(e) <= 0.2 for e in errors) / len(errors),
    }


@dataclass(frozen=True)
class EngineSteps:
    """Decode steps of this engine in one file.

    Attributes:
        name: of the model.
        shape: of the model.
        hardware: that ran it.
        steps: `{"users", "context", "step_s"}` each.
    """

    name: str
    shape: ModelShape
    hardware: Hardware
    steps: list[dict[str, float]]

    @classmethod
    def read(cls, path: Path) -> "EngineSteps":
        """Of `{"model", "hardware", "steps"}`, or of what `latent_steps.py` writes."""
        data = json.loads(path.read_text("utf-8"))
        name, shape = data["model"], load_model(data["model"])
        if "changes" in data:
            fields = {**bundled_config(name)[0], **data["changes"]}
            fields.pop("quantization_config", None)
            shape = replace(shape_from_config(fields, name), plain_dtype="bf16", quantised={})
            name = f"{name}, {len(shape.layers)} layers"
        steps = data["decodes"] if "decodes" in data else data["steps"]
        return cls(name, shape, load_hardware(data["hardware"]), steps)

    @property
    def shortest(self) -> list[dict[str, float]]:
        """The steps of the shortest context."""
        least = min(step["context"] for step in self.steps)
        return [step for step in self.steps if step["context"] == least]

    def predict(self, c: Calibration, step: dict[str, float]) -> float:
        """Seconds of a step."""
        cost = CostModel(self.shape, self.hardware, Layout(), "bf16", c, Routing())
        return cost.decode(step["users"], step["context"]).expected_s


def engine_rows(paths: list[Path]) -> tuple[Calibration, list[Row]]:
    """Steps of this engine, and its two constants fitted on those of the shortest contexts.

    First the kernels of a layer over latents that are not counted, on steps of one user; then the
    time per user, on all.
    """
    files = [EngineSteps.read(path) for path in paths]
    c = replace(CALIBRATIONS["hotset"], user_s=0.0, latent_kernels=0)
    missing = [
        (step["step_s"] - file.predict(c, step)) / c.kernel_s / over_latents
        for file in files
        if (over_latents := sum(x.attention.kind is Kind.MLA for x in file.shape.layers))
        for step in file.shortest
        if step["users"] == 1
    ]
    if missing:
        c = replace(c, latent_kernels=round(sum(missing) / len(missing)))

    def squares(c: Calibration) -> float:
        """Sum of the squared relative errors."""
        return sum(
            (file.predict(c, step) / step["step_s"] - 1) ** 2
            for file in files
            for step in file.shortest
        )

    # What the device hides leaves no trace, so the time per user is searched for, in 0.1 us.
    c = min((replace(c, user_s=tenths * 1e-7) for tenths in range(400)), key=squares)
    return c, [
        Row(
            "engine",
            f"{file.name}: {s['users']} users x {s['context']}",
            s["step_s"],
            file.predict(c, s),
            True,
            s in file.shortest,
        )
        for file in files
        for s in file.steps
    ]


def show(rows: list[Row]) -> None:
    print("| row | what | measured | predicted | error |")
    print("|---|---|---|---|---|")
    for row in rows:
        unit = ("ms", 1e3) if row.is_time else ("tok/s/GPU", 1.0)
        measured, predicted = row.value * unit[1], row.predicted * unit[1]
        print(
            f"| {row.row}{' (fitted)' if row.fitted else ''} | {row.what} | {measured:,.4g} "
            f"{unit[0]} | {predicted:,.4g} | {row.error:+.0%} |"
        )
    print()


def show_engine(paths: list[Path]) -> dict[str, float]:
    """Print what was fitted on this engine's steps, and the steps; the summary of those left."""
    own, rows = engine_rows(paths)
    print()
    for name in ("latent_kernels", "user_s"):
        fitted, ships = getattr(own, name), getattr(CALIBRATIONS["hotset"], name)
        print(f"{name} of this engine: fitted {fitted:.3g}, shipped {ships:.3g}")
    print()
    show(rows)
    found = summary([row for row in rows if not row.fitted])
    print(
        f"this engine: {found['rows']} rows not fitted, mean absolute error "
        f"{found['mean_absolute_error']:.1%}, mean signed {found['mean_signed_error']:+.1%}, "
        f"largest {found['largest']:+.0%}"
    )
    return found


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument(
        "--measured", type=Path, nargs="+", help="JSON files of steps measured on this engine"
    )
    arguments = parser.parse_args()
    c, shipped = fit(), Calibration()
    for name in ("memory_efficiency", "kernel_s", "user_s"):
        print(f"{name}: fitted {getattr(c, name):.4g}, shipped {getattr(shipped, name):.4g}")
        if not math.isclose(getattr(c, name), getattr(shipped, name), rel_tol=0.02):
            print(f"  calibration.py ships another {name}: update it")
    print()
    rows = published(c)
    show(rows)
    scored = summary([row for row in rows if not row.fitted])
    fitted = summary([row for row in rows if row.fitted])
    for label, numbers in (("fitted rows", fitted), ("scored rows", scored)):
        print(
            f"{label}: {numbers['rows']}, mean absolute error "
            f"{numbers['mean_absolute_error']:.1%}, "
            f"mean signed {numbers['mean_signed_error']:+.1%}, "
            f"largest {numbers['largest']:+.0%}, within 20 %: {numbers['within_20_percent']:.0%}"
        )
    ranked = rankings(c)
    for entry in ranked:
        print(f"{entry['what']}: {'right' if entry['ranked_right'] else 'WRONG'}", end="; ")
        print(", ".join(f"{k} {v:.3g}" for k, v in entry["predicted"].items()))  # type: ignore[attr-defined]
    engine = show_engine(arguments.measured) if arguments.measured else {}
    constants = {n: getattr(c, n) for n in ("memory_efficiency", "kernel_s", "user_s")}
    found = record.start(
        fitted_constants=constants,
        rows=[
            {
                "row": r.row,
                "what": r.what,
                "measured": r.value,
                "predicted": r.predicted,
                "unit": "s" if r.is_time else "tokens/s/GPU",
                "error": r.error,
                "fitted": r.fitted,
            }
            for r in rows
        ],
        fitted=fitted,
        scored=scored,
        rankings=ranked,
        engine=engine,
    )
    record.write(arguments.out, found)


if __name__ == "__main__":
    main()
