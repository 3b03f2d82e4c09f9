"""Formats of narrow weights: their planes, and the bytes that the planner counts."""

import itertools
import math

import pytest

from hotset.cost.catalog import bundled_config
from hotset.cost.families import shape_from_config
from hotset.cost.params import FORMATS, name_of
from hotset.cost.quantisation import stored_format
from hotset.weight_format import ALIGN_BYTES, FP8_BLOCK, FP8_ROW, INT4, MXFP4, NVFP4, WeightFormat

GPT_OSS_UP = (5760, 2880)


def packed(bits: int, **more: object) -> dict[str, object]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 128, **more}
    groups = {"group_0": {"weights": weights}}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(7, 256), (2, 100, 384), GPT_OSS_UP])
@pytest.mark.parametrize("form", [each for each in FORMATS.values()] + [INT4])
def test_planes_are_aligned_do_not_meet_and_hold_what_is_counted(
    form: WeightFormat, shape: tuple[int, ...]
) -> None:
    planes = form.planes(shape, 640)
    assert planes[0].offset == 640
    for one, after in itertools.pairwise(planes):
        assert one.offset + one.num_bytes <= one.end == after.offset
        assert after.offset % ALIGN_BYTES == 0
    assert sum(plane.num_bytes for plane in planes) == form.num_bytes(shape)
    assert form.bits(shape) == 8 * form.num_bytes(shape) / math.prod(shape)


@pytest.mark.parametrize(
    ("form", "shape", "num_bytes"),
    [
        (MXFP4, GPT_OSS_UP, 8_294_400 + 518_400),  # of gpt-oss' files
        (FP8_BLOCK, (2, 768, 2048), 2 * (768 * 2048 + 6 * 16 * 4)),  # of Qwen3-30B-A3B-FP8's
        (FP8_BLOCK, (576, 7168), 576 * 7168 + 5 * 56 * 4),  # of DeepSeek-V3's: the last is ragged
        (FP8_ROW, (96, 128), 96 * 128 + 96 * 4),
        (NVFP4, (96, 128), 96 * 64 + 96 * 8 + 96 * 4),
        (WeightFormat("int4", "float16", 1, 32, True), (8, 64), 8 * 32 + 8 * 2 * 3),
    ],
)
def test_bytes_are_those_of_the_files(
    form: WeightFormat, shape: tuple[int, ...], num_bytes: int
) -> None:
    assert form.num_bytes(shape) == num_bytes


def test_rows_that_end_within_a_byte_have_no_planes() -> None:
    with pytest.raises(ValueError, match="rows of 33 numbers of 4 bits"):
        MXFP4.planes((4, 33))


@pytest.mark.parametrize(
    ("config", "expected", "name"),
    [
        ({"quant_method": "mxfp4"}, MXFP4, "mxfp4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, FP8_BLOCK, "fp8_block"),
        ({"quant_method": "fp8"}, FP8_ROW, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, FP8_ROW, "fp8"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128},
            WeightFormat("int4", "float16", 1, 128, True), "int4",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True},
            WeightFormat("int4", "float16", 1, 128), "int4_symmetric",
        ),
        (packed(4), WeightFormat("int4", "bfloat16", 1, 128), "int4_symmetric"),
        (packed(8), WeightFormat("int8", "bfloat16", 1, 128), "int8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, NVFP4, "nvfp4"),
        ({"quant_method": "quark"}, None, None),
    ],
)  # fmt: skip
def test_a_config_names_its_format(
    config: dict[str, object], expected: WeightFormat | None, name: str | None
) -> None:
    form = stored_format(config)
    assert form == expected
    if form is not None:
        assert name_of(form) == name


CONFIGS: dict[str, tuple[str, dict[str, object] | None]] = {
    "mxfp4": ("gpt-oss-120b", None),
    "fp8 blocks": ("qwen3-30b-a3b", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8 rows": ("qwen3-30b-a3b", {"quant_method": "fbgemm_fp8"}),
    "awq": ("qwen3-30b-a3b", {"quant_method": "awq", "bits": 4, "group_size": 128}),
    "gptq": ("qwen3-30b-a3b", {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}),
    "int4": ("qwen3-30b-a3b", packed(4)),
    "int4 in 32": ("qwen3-30b-a3b", packed(4, group_size=32)),
    "nvfp4": ("qwen3-30b-a3b", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_planner_counts_an_expert_as_the_loader_and_slots_hold_it(name: str) -> None:
    """But for whole pages, and the scales of rows and planes' ends, of which it knows none."""
    from hotset.experts.narrow import NarrowLayout

    model, quantised = CONFIGS[name]
    config, _ = bundled_config(model)
    config = config if quantised is None else {**config, "quantization_config": quantised}
    shape = shape_from_config(config, model)
    form = stored_format(config["quantization_config"])
    assert form is not None
    hidden = config["hidden_size"]
    middle = config.get("moe_intermediate_size", config["intermediate_size"])
    layout = NarrowLayout((2, middle, hidden), (hidden, middle), form)
    in_files = sum(form.num_bytes(matrix.shape) for matrix in layout.matrices)
    of_rows = 4 * (2 * middle + hidden) * (form.has_row_scales or form.columns is None)
    biases = 2 * shape.moe_layers[0].expert.vector
    assert shape.expert_bytes_each - biases == in_files - of_rows
    assert 0 <= layout.payload_bytes - in_files < 4096 + 8 * ALIGN_BYTES
