"""How the parts of a decode step add up by each engine's calibration."""

import math
from dataclasses import replace

import pytest

from hotset.cost.calibration import CALIBRATIONS, Calibration
from hotset.cost.catalog import load_model
from hotset.cost.hardware import load_hardware
from hotset.cost.routing import Routing
from hotset.cost.step_time import CostModel
from hotset.layout import Layout

H200 = load_hardware("h200")


def cost_of(model: str, calibration: Calibration) -> CostModel:
    return CostModel(load_model(model), H200, Layout(), "bf16", calibration, Routing())


def test_a_step_takes_the_longer_of_host_and_device_where_they_run_beside_each_other() -> None:
    ours = CALIBRATIONS["hotset"]
    large = cost_of("llama-3-8b", ours).decode(256, 512)
    assert large.parts["per_user"] == 0
    small = cost_of("smollm2-135m", ours).decode(1024, 16)
    assert small.expected_s == pytest.approx(1024 * ours.user_s)
    behind = replace(ours, host_is_hidden=False)
    for model, users, step in (("llama-3-8b", 256, large), ("smollm2-135m", 1024, small)):
        in_sequence = cost_of(model, behind).decode(users, 512 if users == 256 else 16)
        assert in_sequence.parts["per_user"] == users * ours.user_s
        assert in_sequence.expected_s > step.expected_s


def test_rows_of_a_product_cost_time_before_compute_bounds_it_unless_reading_is_hidden() -> None:
    ours = CALIBRATIONS["hotset"]
    hidden = cost_of("llama-3-8b", replace(ours, reading_is_hidden=True))
    both = cost_of("llama-3-8b", ours)
    read_s = both.shard.dense_read_bytes / both.memory_bytes_per_s
    for users in (1, 128, 1024):
        compute_s = 2 * both.shape.matmul_params * users / (0.6 * H200.flops_for("bf16")[1])
        longer, root = (cost.decode(users, 0) for cost in (hidden, both))
        assert longer.parts["dense_weights"] == pytest.approx(max(read_s, compute_s))
        assert root.parts["dense_weights"] == pytest.approx(math.hypot(read_s, compute_s))
        assert longer.bounds == root.bounds
        assert root.bounds["dense_weights"] == (
            "HBM bandwidth" if read_s >= compute_s else "compute"
        )


def test_layers_over_latents_have_an_engines_own_kernels() -> None:
    ours = CALIBRATIONS["hotset"]
    fused = replace(ours, latent_kernels=0)
    more = {
        model: cost_of(model, ours).decode(1, 8).parts["launch"]
        - cost_of(model, fused).decode(1, 8).parts["launch"]
        for model in ("deepseek-v3", "llama-3-8b")
    }
    assert more["llama-3-8b"] == 0
    assert more["deepseek-v3"] == pytest.approx(61 * ours.latent_kernels * ours.kernel_s)


def test_a_chunk_of_a_prompt_reads_the_head_behind_the_products_of_the_layers() -> None:
    cost = cost_of("llama-3-8b", CALIBRATIONS["published"])
    shape, rate = cost.shape, cost.memory_bytes_per_s
    head_s = 2 * shape.head.count / rate
    launch_s = cost.decode(1, 0).parts["launch"]
    few, many = cost.chunk_s(1), cost.chunk_s(4096)
    assert few == pytest.approx(cost.shard.dense_read_bytes / rate + launch_s)
    products_s = 2 * (shape.matmul_params - shape.head.count) * 4096
    products_s /= 0.6 * H200.flops_for("bf16")[1]
    assert many == pytest.approx(products_s + head_s + launch_s)
