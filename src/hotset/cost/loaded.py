"""The cost model of a model that is loaded, on one device or on several."""

from dataclasses import replace
from typing import Any

from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.families import shape_from_config
from hotset.cost.hardware import Hardware
from hotset.cost.routing import Routing
from hotset.cost.step_time import CostModel
from hotset.errors import PlanError
from hotset.layout import Layout

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "fp8": "fp8"}
_ONE_GPU = Layout()


def make_cost_model(
    config: dict[str, Any],
    name: str,
    dtype: str,
    hardware: Hardware,
    *,
    kv_dtype: str = "auto",
    index_dtype: str = "auto",
    layout: Layout = _ONE_GPU,
) -> CostModel:
    """The cost model of a loaded model on one device, or on those of a layout.

    Raises:
        PlanError: the planner does not know such a model.
    """
    plain = _DTYPES.get(dtype)
    if plain is None:
        raise PlanError(f"the planner does not know dtype {dtype}")
    shape = shape_from_config(config, name).with_weights(plain).stored
    shape = replace(shape, index_dtype=index_dtype)
    kv = kv_dtype
    if kv_dtype == "auto":
        kv = "bf16" if dtype == "fp8" else plain
    return CostModel(shape, hardware, layout, kv, CALIBRATIONS["hotset"], Routing())
