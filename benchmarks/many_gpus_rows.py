"""The rows of `many_gpus.py`: what runs on N GPUs, and what the cost model says of it before."""

import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import narrow_models

from hotset.bench.predict import predict
from hotset.bench.workload import Spec, make_work
from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.catalog import load_model
from hotset.cost.hardware import Hardware
from hotset.cost.layout import check_layout
from hotset.cost.routing import Routing
from hotset.cost.step_time import CostModel
from hotset.errors import PlanError
from hotset.layout import Layout
from hotset.plan import expert_links
from hotset.plan.planner import make_plan
from hotset.plan.workload import Request, Workload
from hotset.units import GIB

MAX_STEP_TOKENS = 8192
_MOE_TOKEN_BYTES, _MOE_KV_HEADS = 98_304, 4  # of Qwen3-30B-A3B in bfloat16
_SHAPES = Path(__file__).parents[1] / "src" / "hotset" / "bench" / "shapes"
_SMALL_DENSE = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "intermediate_size": 256, "vocab_size": 1024, "head_dim": 16,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size:
    """How large everything is: as published, or for a try on a CPU.

    Attributes:
        dense: a dense model that one GPU holds.
        large: one that it does not hold.
        moe: a Mixture of Experts.
        wide: large ones, each with a key of `narrow_models.QUANTISATIONS`.
        users: of decode steps.
        most_users: of all other rows.
        shrink: by which lengths are divided.
    """

    dense: str
    large: str
    moe: str
    wide: dict[str, str]
    users: tuple[int, ...]
    most_users: int
    shrink: int

    @property
    def max_model_len(self) -> int:
        """Of the engines."""
        return 4096 // self.shrink

    @classmethod
    def full(cls) -> "Size":
        """As published."""
        wide = {"qwen3-235b-a22b": "fp8", "deepseek-v3": "fp8"}
        return cls("llama-3-8b", "llama-3-70b", expert_links.MODEL, wide, (1, 64, 256), 256, 1)

    @classmethod
    def small(cls) -> "Size":
        """Models of a few MB and contexts of a sixteenth."""
        file = Path(tempfile.mkdtemp(prefix="many-gpus-")) / "config.json"
        file.write_text(json.dumps(_SMALL_DENSE), "utf-8")
        moe = str(_SHAPES / "qwen3-moe-small.json")
        return cls(str(file), str(file), moe, {}, (1, 4), 4, 16)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        name: the same for each number of GPUs.
        gpus: that it is of.
        layout: of them; None is `tp` over all.
        spec: of the workload.
        arm: of `hotset bench`.
        options: of the engine.
        is_step: whether a decode step is meant, else all requests.
        expert_row: that predicts it; None leaves that to the models of its job.
        why_not: why it is not run.
    """

    name: str
    gpus: int
    spec: Spec
    arm: str = "hot"
    options: dict[str, Any] = field(default_factory=dict)
    is_step: bool = False
    layout: Layout | None = None
    expert_row: expert_links.ExpertRow | None = None
    why_not: str = ""

    @property
    def tp(self) -> int:
        """Ranks of the engine that runs it."""
        return (self.layout or Layout(self.gpus)).tp


@dataclass(frozen=True, slots=True)
class Job:
    """Rows of one model that is loaded once.

    Attributes:
        model: as `load_dummy` takes it.
        planned: as the planner takes it.
        quantisation: key of `narrow_models.QUANTISATIONS`; None leaves the model as it is.
        options: of the engine, that loading needs too.
    """

    name: str
    model: str
    rows: list[Row]
    quantisation: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def file(self) -> str:
        """What `load_dummy` takes."""
        return narrow_models.config_file(self.model, self.quantisation)


def jobs(size: Size, gpus: int) -> list[Job]:
    """All that is to be run on that many GPUs."""
    found = [_dense(size, gpus), *_experts(size, gpus)]
    if gpus > 1:
        found += [_large(size, gpus), *_wide(size, gpus)]
    return found


def _unshared(users: int, prompt: int, output: int) -> Spec:
    # Sampled: greedy answers of random weights repeat few tokens, and so use few experts.
    return Spec(
        "unshared",
        users=users,
        first_tokens=prompt,
        output_tokens=output,
        temperature=1.0,
        seed=1000,
    )


def _steps(size: Size, gpus: int) -> list[Row]:
    """Decode steps with a mean context of 1,024 tokens."""
    specs = [_unshared(users, 976 // size.shrink, 96 // size.shrink) for users in size.users]
    return [Row(f"decode step of {s.users} users", gpus, s, is_step=True) for s in specs]


def _dense(size: Size, gpus: int) -> Job:
    users, shrink = size.most_users, size.shrink
    a512 = _unshared(users, 512 // shrink, 256 // shrink)
    turns = Spec(
        "multiturn",
        users,
        6,
        first_tokens=896 // shrink,
        new_tokens=128 // shrink,
        output_tokens=64 // shrink,
        seed=1004,
    )
    hot_gib = (16 if shrink == 1 else 0.0012) / gpus
    tiers = {"hot_gib": hot_gib, "host_gib": 64.0 / shrink**2}
    rows = [
        *_steps(size, gpus),
        Row("A512", gpus, a512),
        Row("C6, KV in host memory", gpus, turns, "host", tiers),
    ]
    if gpus > 1 and users % gpus == 0:
        one = replace(a512, users=users // gpus)
        name = "A512 by replicas: one of them, with its part of the users"
        rows.append(Row(name, gpus, one, layout=Layout(1, gpus)))
    return Job("dense", size.dense, rows)


def _large(size: Size, gpus: int) -> Job:
    served = _unshared(size.most_users, 512 // size.shrink, 32 // size.shrink)
    return Job("large", size.large, [*_steps(size, gpus), Row("256 x 512/32", gpus, served)])


def _experts(size: Size, gpus: int) -> list[Job]:
    """The rows of `hotset plan --example moe-7.8x`: the same slots and KV in all."""
    found = []
    for dtype in dict.fromkeys(row.cold_dtype for row in expert_links.ROWS):
        rows = []
        for row in (row for row in expert_links.ROWS if row.cold_dtype == dtype):
            users = min(row.users, size.most_users)
            spec = _unshared(users, row.prompt // size.shrink, row.output // min(8, size.shrink))
            kv_gib = users * (row.prompt + row.output + 32) * _MOE_TOKEN_BYTES / GIB
            kv_gib = kv_gib if size.shrink == 1 else 0.002
            options = {
                "expert_slots": row.num_slots,
                "expert_cold_dtype": dtype,
                "hot_gib": kv_gib / min(gpus, _MOE_KV_HEADS),  # of each rank
            }
            is_known = size.shrink == 1
            rows.append(
                Row(
                    row.name,
                    gpus,
                    spec,
                    "experts",
                    options,
                    row.is_step,
                    expert_row=row if is_known else None,
                )
            )
        name = f"experts-{'bf16' if dtype == 'auto' else dtype}"
        found.append(Job(name, size.moe, rows, options=rows[0].options))
    return found


def _wide(size: Size, gpus: int) -> list[Job]:
    """Tensor parallelism against groups whose tokens meet in slices, at 256 and 1,024 users."""
    found = []
    for model, quantisation in size.wide.items():
        rows = []
        for users in (256, 1024):
            spec = _unshared(users, 2000, 96)
            name = f"{model}, decode step of {users} users of 2,048 tokens"
            rows.append(Row(f"{name}, tp", gpus, spec, is_step=True))
            groups = Layout(1, gpus, es=gpus)
            why_not = "this engine has no groups (dp): predicted only"
            row = Row(f"{name}, dp", gpus, spec, is_step=True, layout=groups, why_not=why_not)
            rows.append(row)
        found.append(Job(model, model, rows, quantisation))
    return found


def predict_row(job: Job, row: Row, hardware: Hardware) -> float:
    """Seconds, from constants of one GPU and what `hardware` has of several.

    Raises:
        PlanError: the layout cannot be, or does not hold the model and its users.
    """
    if row.expert_row is not None:
        return row.expert_row.predict(row.gpus, hardware)
    layout, spec = row.layout or Layout(row.gpus), row.spec
    shape = load_model(job.model)
    if job.quantisation is not None and not shape.quantised:
        shape = shape.with_weights("fp8_block" if job.quantisation == "fp8" else job.quantisation)
    shape = shape.stored
    check_layout(layout, shape, row.gpus)
    calibration, context = CALIBRATIONS["hotset"], spec.first_tokens + spec.output_tokens
    if row.arm == "hot":  # refuses what fits nowhere
        load = Workload(users=spec.users, context=context)
        chips = hardware.with_tiers(host_gib=0, disk_gib=0)
        plan = make_plan(Request(shape, chips, load, layout, row.gpus, calibration=calibration))
        if plan.users_resident < spec.users:
            raise PlanError(f"KV of {plan.users_resident} of {spec.users} users fits")
    one = layout if layout.dp == 1 or row.is_step else Layout(layout.tp)
    cost = CostModel(shape, hardware, one, shape.plain_dtype, calibration, Routing())
    if row.is_step:
        users = spec.users / one.dp
        mean = spec.first_tokens + spec.output_tokens / 2
        return cost.decode(max(1.0, users), mean, mean_users=users).expected_s
    return _serve_s(cost, row)


def _serve_s(cost: CostModel, row: Row) -> float:
    token_bytes = cost.shape.kv_bytes_per_token(cost.kv_dtype)
    rank_bytes = cost.shape.kv_bytes_per_token(cost.kv_dtype, tp=cost.layout.tp)
    work = make_work(row.spec, cost.shape.vocab_size)
    hot_gib = row.options.get("hot_gib")
    hot_tokens = work.kv_tokens if hot_gib is None else int(hot_gib * GIB / rank_bytes)
    return predict(
        cost,
        work,
        hot_tokens=hot_tokens,
        host_tokens=int(row.options.get("host_gib", 0) * GIB / token_bytes),
        disk_tokens=0,
        max_num_seqs=row.spec.users,
        max_batched_tokens=MAX_STEP_TOKENS,
    ).wall_s
