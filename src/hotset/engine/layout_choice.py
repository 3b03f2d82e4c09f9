"""Which layout an engine gets on the GPUs that it was given, where the user names none."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hotset.cgroups import available_host_bytes
from hotset.checkpoint.files import read_config
from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.families import shape_from_config
from hotset.cost.hardware import Hardware
from hotset.cost.layout import check_layout
from hotset.cost.quantisation import with_modelopt, without_quantisation
from hotset.cost.shape import ModelShape
from hotset.engine.memory_split import expected_load
from hotset.errors import ConfigError, PlanError
from hotset.expert_options import AllResident, ExpertSlots, HostedExperts, SplitMemory
from hotset.kernels.device import known_hardware, likely_hardware
from hotset.layout import Layout
from hotset.libraries import quiet
from hotset.model.devices import resolve_device
from hotset.model.find_model import find_model
from hotset.options import Options
from hotset.plan.layouts import choice_text
from hotset.plan.planner import rank_layouts
from hotset.plan.serve_command import why_not_run
from hotset.plan.workload import Request, Workload
from hotset.ranks.torchrun import place
from hotset.units import GIB

ReadConfig = Callable[[Options], tuple[dict[str, Any], str]]

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "fp8": "fp8"}
_CONTEXT = 4096  # where neither the user nor the model says


def stored_config(options: Options) -> tuple[dict[str, Any], str]:
    """The config of the model that options name, fetched first where it is not here; its name."""
    path, name = find_model(options.model.model)
    if path.is_file():
        # Here, as it needs parts of transformers that others do without.
        from hotset.checkpoint.gguf_file import GgufFile, read_once

        with read_once(), quiet():
            return GgufFile(path).config().to_dict(), name
    return with_modelopt(path, read_config(path)), name


def choose_layout(options: Options, read: ReadConfig = stored_config) -> tuple[Options, str]:
    """Options with a layout, and the lines that say which it is and why.

    As they are, and without a line, where the layout was given or there is one GPU.

    Args:
        options: the user's.
        read: gives the model's config and its name.

    Raises:
        ConfigError: no layout of these GPUs can be run; what `read` raises.
    """
    layout = options.layout
    if layout.num_gpus == layout.spread.gpus:
        return options, ""
    gpus, device = layout.num_gpus, resolve_device(options.model.device)
    fields, name = read(options)
    simple = Layout(tp=gpus)
    try:
        shape = _shape(fields, name, options, device)
    except PlanError as error:
        return _with(options, simple), f"{simple}, as the planner does not know the model: {error}"
    try:
        request = _request(options, shape, device, gpus)
        plans = rank_layouts(request)
    except PlanError as error:
        return _with(options, _checked(simple, shape)), f"{simple}, as there is no plan: {error}"
    found = [plan for plan in plans if not why_not_run(plan) and _goes_with(options, plan.layout)]
    if not found:
        return _with(options, _checked(simple, shape)), f"{simple}: the planner has none for {name}"
    text = f"{choice_text(plans, found)}\n{_source(request.hardware, device, gpus)}"
    return _with(options, found[0].layout), text


def _goes_with(options: Options, layout: Layout) -> bool:
    """Whether the user asks for nothing that such a layout has not."""
    try:
        _with(options, layout)
    except ConfigError:
        return False
    return True


def _checked(layout: Layout, shape: ModelShape) -> Layout:
    """The layout. Raises ConfigError: the model cannot be cut so."""
    try:
        check_layout(layout, shape, None)
    except PlanError as error:
        raise ConfigError(str(error)) from error
    return layout


def _with(options: Options, layout: Layout) -> Options:
    return options.but(tp=layout.tp, dp=layout.dp, ep=layout.ep > 1)


def _shape(fields: dict[str, Any], name: str, options: Options, device: torch.device) -> ModelShape:
    dtype = options.model.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    if dtype == "auto":
        shape = shape_from_config(fields, name)
    else:
        shape = shape_from_config(without_quantisation(fields), name).with_weights(_DTYPES[dtype])
    return replace(shape.stored, index_dtype=options.model.index_dtype)


def _request(options: Options, shape: ModelShape, device: torch.device, gpus: int) -> Request:
    """What the planner is asked: the engine's memory, and requests as the user expects them."""
    memory, experts, schedule = options.memory, options.experts, options.schedule
    asked = experts if isinstance(experts, SplitMemory) else SplitMemory()
    max_len = min(schedule.max_model_len or _CONTEXT, shape.max_context or 10**9)
    load = expected_load(asked, schedule, max_len)
    slots = None
    if isinstance(experts, AllResident) and shape.moe_layers:
        slots = shape.num_experts
    elif isinstance(experts, ExpertSlots):
        slots = experts.expert_slots
    host_gib = memory.host_gib
    if isinstance(experts, HostedExperts):  # those without a slot are there too
        host_gib = available_host_bytes() / GIB
    kv_dtype = shape.plain_dtype if options.model.kv_dtype == "auto" else options.model.kv_dtype
    return Request(
        shape=shape,
        hardware=_hardware(device).with_tiers(host_gib=host_gib, disk_gib=memory.disk_gib),
        workload=Workload(
            users=max(1, round(load.users)),
            context=round(load.prompt_tokens + load.output_tokens),
            output=round(load.output_tokens),
        ),
        gpus=gpus,
        kv_dtype=kv_dtype,
        host_given=True,
        total_bytes=None if memory.total_gib is None else memory.total_gib * GIB,
        hot_bytes=None if memory.hot_gib is None else memory.hot_gib * GIB,
        expert_slots=slots,
        calibration=CALIBRATIONS["hotset"],
    )


def _hardware(device: torch.device) -> Hardware:
    """Of this machine, with the memory that its GPUs have; of several hosts, by torchrun's word."""
    hardware, here = likely_hardware(device), place()
    if here is not None and here.num_hosts > 1:
        hardware = replace(
            hardware,
            peer_gpus=min(hardware.peer_gpus, here.num_local),
            gpus_per_host=here.num_local,
            together={n: one for n, one in hardware.together.items() if n <= here.num_local},
        )
    if device.type != "cuda":
        return hardware
    return replace(hardware, hbm_bytes=float(torch.cuda.get_device_properties(device).total_memory))


def _source(hardware: Hardware, device: torch.device, gpus: int) -> str:
    """Where the figures come from."""
    if known_hardware(device) is None:
        return (
            f"rates: those of {hardware.name}, as this machine was not measured; "
            f"hotset probe --gpus {gpus} does so"
        )
    together = hardware.together.get(gpus)
    if together is None:
        return (
            f"rates: {hardware.name}; collectives and links of {gpus} GPUs at once are assumed, "
            f"hotset probe --gpus {gpus} measures them"
        )
    return f"rates: {hardware.name}; of {gpus} GPUs at once: {together.source}"
