"""The `hotset serve` command that runs what was planned, or why there is none."""

import re
import shlex
from pathlib import Path

from hotset.cost.attention import Kind
from hotset.layout import Layout
from hotset.plan.choices import staged_bytes
from hotset.plan.result import Plan

GIB = 2**30
MOST_REQUESTS = 2**20  # `--max-num-seqs` takes no more

_HUB = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "fp8"}
_NOT_CUT = ("phi3", "llama4_text", "longcat_flash")  # see `parallel.cuts.find_cuts`
_STATES_ALONE = ("mamba2",)  # no layer attends
_LEAST_STATES = 3  # two that no request gets, see `StateSizes`
_OWN_EXPERTS = ("llama4", "dbrx", "jetmoe")  # computed by the model's own code, all resident


def serve_command(plan: Plan) -> str | None:
    """The command for a shell, or None where `why_not_served` has a reason."""
    return None if why_not_served(plan) else shlex.join(["hotset", "serve", *_arguments(plan)])


def as_dict(plan: Plan) -> dict[str, object]:
    """For `--json`: the command, or why there is none."""
    return {"command": serve_command(plan), "why_not": why_not_served(plan) or None}


def why_not_served(plan: Plan) -> str:
    """Why `hotset serve` cannot run the plan, in one line; empty where it can."""
    request, shape = plan.request, plan.request.shape
    context = request.workload.context
    stored = shape.matrix_dtype
    # (what is planned and not served, what to say of it)
    reasons = (
        (
            Path(shape.name).suffix == ".json" and Path(shape.name).name != "config.json",
            f"{shape.name} is a shape without weights, which hotset bench runs with random ones",
        ),
        (bool(why_not_run(plan)), why_not_run(plan)),
        (
            shape.model_type in _STATES_ALONE,
            f"hotset serve does not run recurrent layers as {shape.name} has them",
        ),
        (
            0 < _kv_given(plan) < _LEAST_STATES * shape.state_bytes,
            f"hotset serve has three states of {shape.name} on the device for one request: plan "
            "more --hot-gib",
        ),
        (
            shape.max_context is not None and context > shape.max_context,
            f"{shape.name} is made for {shape.max_context} tokens, not {context}",
        ),
        (
            plan.mode == "stream",
            "hotset serve does not read KV over the link in each step: plan without --stream-kv",
        ),
        (
            request.free_windows and shape.kv_bytes(context, request.kv_dtype) < _full_kv(plan),
            "hotset serve keeps each token in layers with a window: plan without --free-windows",
        ),
        (
            stored not in _DTYPES,
            f"hotset serve has no {stored} weights on the device: plan --dtype bfloat16",
        ),
        (
            stored == "fp8" and bool(shape.num_experts),
            "hotset serve keeps experts in bfloat16 with --dtype fp8: plan --dtype bfloat16",
        ),
        (
            shape.is_mla and request.kv_dtype != _wide(stored),
            f"hotset serve stores latents in {_wide(stored)}, not {request.kv_dtype}",
        ),
        (
            request.kv_dtype not in ("fp8", _wide(stored)),
            f"hotset serve stores KV in {_wide(stored)} or fp8, not {request.kv_dtype}",
        ),
        (
            plan.resident_expert_share < 1 and shape.model_type in _OWN_EXPERTS,
            f"hotset serve keeps all experts of {shape.name} on the device",
        ),
    )
    return next((reason for is_so, reason in reasons if is_so), "")


def why_not_run(plan: Plan) -> str:
    """Why the engine cannot spread this model over several GPUs as planned; empty where it can."""
    if plan.gpus == 1:
        return ""
    layout, shape = plan.layout, plan.request.shape
    has_lanes = layout.dp > 1
    reasons = (
        (
            layout not in _spreads(plan.gpus),
            f"hotset serve does not spread a model over {plan.gpus} GPUs as {layout}: plan "
            f"tp={plan.gpus}, or for experts dp={plan.gpus},es={plan.gpus} or ep={plan.gpus}",
        ),
        (
            has_lanes and any(layer.attention.kind == Kind.RECURRENT for layer in shape.layers),
            f"hotset serve runs the recurrent layers of {shape.name} without dp: plan tp",
        ),
        (
            has_lanes and bool(shape.index_bytes_per_token),
            f"hotset serve runs the sparse attention of {shape.name} without dp: plan tp",
        ),
        (
            has_lanes and plan.request.hardware.disk_bytes > 0,
            "hotset serve has no disk tier with dp: plan tp, or leave --disk-gib out",
        ),
        (
            layout.ep > 1 and plan.resident_expert_share < 1,
            "hotset serve keeps all experts on the GPUs with ep: plan es, or more memory",
        ),
        (
            plan.request.shape.model_type in _NOT_CUT,
            f"hotset serve runs {plan.request.shape.name} with one GPU alone: plan --gpus 1",
        ),
        (
            _experts_on_disk(plan) > 0,
            "hotset serve keeps experts on disk with one GPU alone: plan more --host-gib",
        ),
    )
    return next((reason for is_so, reason in reasons if is_so), "")


def _spreads(gpus: int) -> list[Layout]:
    """The layouts over this number of GPUs that the engine has, whatever the model."""
    return [
        Layout(gpus),
        Layout(gpus, ep=gpus),
        Layout(1, gpus, es=gpus),
        Layout(1, gpus, ep=gpus),
    ]


def _wide(stored: str) -> str:
    """The dtype of KV that is not narrowed, beside weights stored as `stored`."""
    return "bf16" if stored == "fp8" else stored


def _full_kv(plan: Plan) -> int:
    request = plan.request
    return request.shape.kv_bytes(request.workload.context, request.kv_dtype, hold_windows=False)


def _arguments(plan: Plan) -> list[str]:
    request, shape, layout = plan.request, plan.request.shape, plan.layout
    hot = plan.hot_set if plan.hot_set and plan.hot_set.pays else None
    users = hot.hot.users if hot else plan.users_running
    words = {
        "--model": model_to_serve(shape.name, shape.source),
        "--dtype": _DTYPES[shape.matrix_dtype],
        **({"--tp": str(layout.tp)} if layout.tp > 1 else {}),
        **({"--dp": str(layout.dp)} if layout.dp > 1 else {}),
        "--kv-dtype": "fp8" if request.kv_dtype == "fp8" else "auto",
        **_index_dtype(plan),
        **_device_memory(plan),
        **_slower_tiers(plan),
        "--max-model-len": str(request.workload.context),
        "--max-num-seqs": str(min(MOST_REQUESTS, users)),
    }
    if hot:
        words["--hot-tokens"] = str(hot.slots)
        if request.row_prefetch:
            words["--row-prefetch"] = str(request.row_prefetch)
    return [
        *(word for pair in words.items() for word in pair),
        *(("--ep",) if layout.ep > 1 else ()),
    ]


def model_to_serve(name: str, source: str) -> str:
    """What `--model` takes for a model that was planned: its hub id, or its folder."""
    if hub := _HUB.match(source):
        return hub[1]
    return str(Path(name).parent) if Path(name).suffix == ".json" else name


def _index_dtype(plan: Plan) -> dict[str, str]:
    """Where it is not what serve takes by itself."""
    shape = plan.request.shape
    is_rounded = bool(shape.index_bytes_per_token) and shape.index_dtype == "fp8"
    return {"--index-dtype": "fp8"} if is_rounded else {}


def _device_memory(plan: Plan) -> dict[str, str]:
    """What was given for the device, and experts where some are not resident."""
    request, share = plan.request, plan.resident_expert_share
    slots = int(share * request.shape.num_experts + 1e-6)
    is_buffered = slots < request.shape.num_experts
    words = {}
    if request.total_bytes is not None:
        words["--total-gib"] = _gib(request.total_bytes)
    if request.hot_bytes is not None:
        words["--hot-gib"] = _gib(_kv_given(plan))
    if is_buffered:
        words["--expert-slots"] = str(slots)
        if slots == 0:
            words["--expert-plan"] = "stream"
    return words


def _kv_given(plan: Plan) -> float:
    """The part of `--hot-gib` for KV and state; 0 where it is not given."""
    request, share = plan.request, plan.resident_expert_share
    if request.hot_bytes is None or request.expert_slots is not None or share == 1:
        return request.hot_bytes or 0.0
    return request.hot_bytes - staged_bytes(plan.cost, share)  # beside slots it is for KV alone


def _slower_tiers(plan: Plan) -> dict[str, str]:
    """Host memory and disk for KV: all that was given, else what KV takes there."""
    words = {}
    host = max(plan.host_kv_bytes, plan.hot_set.host_bytes if plan.hot_set else 0.0)
    if plan.request.host_given:
        host = plan.host_bytes - plan.host_experts_bytes
    if host > 0:
        words["--host-gib"] = _gib(host)
    on_disk = _experts_on_disk(plan)
    if on_disk > 0:
        words["--expert-host-gib"] = _gib(plan.host_experts_bytes)
    if plan.disk_bytes > on_disk:
        words["--disk-gib"] = _gib(plan.disk_bytes - on_disk)
    return words


def _experts_on_disk(plan: Plan) -> float:
    """Bytes of experts that neither GPUs nor host memory hold."""
    missing = (1 - plan.resident_expert_share) * plan.cost.shard.experts_bytes * plan.layout.gpus
    return max(0.0, missing - plan.host_experts_bytes)


def _gib(num_bytes: float) -> str:
    """A size as flags take it: GiB with three decimals, at least 0.001."""
    return f"{max(0.001, num_bytes / GIB):.3f}".rstrip("0").rstrip(".")
