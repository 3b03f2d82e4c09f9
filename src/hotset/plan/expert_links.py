"""Experts in host memory over the links of several GPUs: the first of three ways to 7.8 times.

Predicted from constants of one GPU, and beside it what was measured, where the package has a file
of that: `many_gpus.json`, as `benchmarks/many_gpus.py` writes it. Imports no torch.
"""

from dataclasses import dataclass, replace
from importlib import resources

from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.catalog import load_model
from hotset.cost.expert_steps import ExpertCost, Load, link_of
from hotset.cost.hardware import Hardware
from hotset.cost.routing import Routing
from hotset.cost.step_time import CostModel
from hotset.foreign_text import parse_json
from hotset.layout import Layout
from hotset.plan.text import rows
from hotset.weight_format import FP8_ROW, INT4, WeightFormat

MODEL = "qwen3-30b-a3b"
GPUS = (1, 2, 4, 8)
MAX_STEP_TOKENS = 8192
_FILE = "many_gpus.json"


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """One workload with the same slots and the same KV in all, whatever the number of GPUs.

    Attributes:
        users: requests at once.
        prompt: tokens of each.
        output: tokens of each answer.
        num_slots: experts of each layer on the GPUs, of 128.
        is_step: whether a decode step is meant, else all requests.
        cold_dtype: of the copies in host memory, as `--expert-cold-dtype` has it.
    """

    users: int
    prompt: int
    output: int
    num_slots: int
    is_step: bool
    cold_dtype: str = "auto"

    @property
    def name(self) -> str:
        """In tables and files."""
        what = "a decode step of 16 users" if self.is_step else "256 x 512/32"
        return f"{what}, {'bf16' if self.cold_dtype == 'auto' else self.cold_dtype} copies"

    def predict(self, gpus: int, hardware: Hardware) -> float:
        """Seconds with `tp` over that many GPUs."""
        shape = load_model(MODEL).stored
        calibration = CALIBRATIONS["hotset"]
        cost = CostModel(shape, hardware, Layout(gpus), "bf16", calibration, Routing())
        link = link_of(cost)
        if (form := _FORMATS[self.cold_dtype]) is not None:
            link = replace(link, cold_bytes=link.cold_bytes * form.bits() / 16)
        experts = ExpertCost(cost, link)
        if self.is_step:
            context = self.prompt + self.output / 2
            return experts.decode_step(self.num_slots, self.users, context).seconds
        served = experts.serve(
            self.num_slots,
            Load(self.users, self.prompt, self.output, num_requests=self.users),
            kv_tokens=self.users * (self.prompt + self.output),
            max_step_tokens=MAX_STEP_TOKENS,
        )
        return served.prompt_s + served.decode_s


_FORMATS: dict[str, WeightFormat | None] = {"auto": None, "fp8": FP8_ROW, "int4": INT4}
ROWS = [
    row
    for dtype in _FORMATS
    for row in (
        ExpertRow(256, 512, 32, 51, False, dtype),
        ExpertRow(16, 512, 96, 81, True, dtype),
    )
]


def measured() -> dict[tuple[str, int], float]:
    """Seconds that were measured, by the name of a row and the number of GPUs; empty without."""
    file = resources.files("hotset.plan") / _FILE
    if not file.is_file():
        return {}
    return {
        (row["row"], row["gpus"]): row["measured_s"]
        for row in parse_json(file.read_text("utf-8"))["rows"]
        if row.get("measured_s") is not None
    }


def links_lines(hardware: Hardware, data: dict[str, object]) -> list[str]:
    """The part of the example: what 2, 4 and 8 links give, and what was measured."""
    found = measured()
    table: list[tuple[str, ...]] = [
        ("", "1 GPU", *(f"{gpus} GPUs" for gpus in GPUS[1:]), "measured on 2")
    ]
    ratios: list[dict[str, object]] = []
    for row in ROWS:
        times = {gpus: row.predict(gpus, hardware) for gpus in GPUS}
        ratio = {gpus: times[1] / times[gpus] for gpus in GPUS}
        of_two = _measured_ratio(found, row)
        unit = (1e3, "ms") if row.is_step else (1.0, "s")
        table.append(
            (
                row.name,
                f"{times[1] * unit[0]:.3g} {unit[1]}",
                *(f"{ratio[gpus]:.2f}x" for gpus in GPUS[1:]),
                "not measured" if of_two is None else f"{of_two:.2f}x",
            )
        )
        by_gpus = {str(gpus): value for gpus, value in ratio.items()}
        ratios.append({"row": row.name, "one_s": times[1], "ratio": by_gpus, "measured_2": of_two})
    data["expert_links"] = ratios
    return [
        "1. Experts over the host links of all GPUs",
        "   Qwen3-30B-A3B in bfloat16, experts cut along their middle: each GPU streams its slice",
        "   of every expert over its own link. 51 of 128 experts per layer have a slot (81 with 16",
        "   users), the same slots and KV in all. Predicted from constants of one GPU",
        f"   {_together(hardware)}.",
        rows(table, "   "),
        "   The more of a step is the link, the nearer to 8: 7.8 is eight links less 2.5 %.",
        *_shared(hardware, data),
    ]


def _measured_ratio(found: dict[tuple[str, int], float], row: ExpertRow) -> float | None:
    one_s, two_s = found.get((row.name, 1)), found.get((row.name, 2))
    return one_s / two_s if one_s and two_s else None


def _together(hardware: Hardware) -> str:
    known = [gpus for gpus in GPUS[1:] if gpus in hardware.together]
    counts = ", ".join(map(str, known))
    return f"and links of {counts} GPUs measured at once" if known else "alone"


def _shared(hardware: Hardware, data: dict[str, object]) -> list[str]:
    """The factor that is left where links or memory are shared."""
    row = ROWS[0]
    one_s = row.predict(1, hardware)
    cases = {
        "two GPUs share a link": replace(hardware, gpus_per_host_link=2, together={}),
        "the host's memory gives 200 GB/s": replace(
            hardware, host_memory_bytes_per_s=200e9, together={}
        ),
    }
    left = {name: one_s / row.predict(8, case) for name, case in cases.items()}
    data["expert_links_shared"] = left
    return [
        "   Not so where eight links are not there:",
        *(f"   {ratio:.1f}x where {name}." for name, ratio in left.items()),
    ]
