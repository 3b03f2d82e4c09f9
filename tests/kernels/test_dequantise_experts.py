"""Experts of few bits, widened while copied; in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.experts.host import ExpertLayout  # noqa: E402
from hotset.experts.narrow import NarrowDType, rounded_layout  # noqa: E402
from hotset.kernels.dequantise_experts import dequantise_experts  # noqa: E402

PAIRS = [(5, 1), (0, 3), (-1, 0), (2, 2), (4, 6), (1, 0), (-1, 4)]


def cut_to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """What the interpreter makes of float32: it cuts where a GPU rounds."""
    return (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("beside_compute", [False, True])
@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", ["fp8", "int4"])
@pytest.mark.parametrize(
    ("up", "down"),
    [
        ((48, 16), (16, 24)),
        ((2, 2816), (64, 192)),  # rows longer than a tile is wide, and many short ones
        ((700, 64), (3, 64)),  # more runs than the programs of an expert take at once
    ],
)
def test_values_are_those_of_the_reference_and_nothing_else_changes(
    up: tuple[int, int],
    down: tuple[int, int],
    dtype: NarrowDType,
    wide: torch.dtype,
    beside_compute: bool,
) -> None:
    torch.manual_seed(0)
    layout, narrow = ExpertLayout(up, down, wide), rounded_layout(up, down, dtype)
    source = narrow.quantise(torch.randn(6, *up), torch.randn(6, *down))
    if DEVICE == "cpu" and wide == torch.bfloat16:
        exact = narrow.dequantise(source, torch.float32)
        expected_up, expected_down = map(cut_to_bfloat16, exact)
    else:
        expected_up, expected_down = narrow.dequantise(source, wide)
    if DEVICE == "cuda":
        source = source.pin_memory()
    payloads = torch.randint(0, 100, (7, layout.payload_bytes), dtype=torch.uint8, device=DEVICE)
    expected = payloads.clone()
    experts, slots = torch.tensor(PAIRS, device=DEVICE).T.contiguous()

    dequantise_experts(
        narrow, source, payloads.view(wide), experts, slots, beside_compute=beside_compute
    )

    up_slots, down_slots = layout.views(expected)
    for expert, slot in PAIRS:
        if expert >= 0:
            up_slots[slot], down_slots[slot] = expected_up[expert], expected_down[expert]
    assert torch.equal(payloads, expected)


def test_all_8_bit_floats_are_what_pytorch_says() -> None:
    narrow = rounded_layout((1, 256), (1, 256), "fp8")
    source = narrow.quantise(torch.ones(1, 1, 256), torch.ones(1, 1, 256))
    source[0, :256] = torch.arange(256, dtype=torch.uint8)
    source[0, [127, 255]] = 0  # the two NaN, which are never stored
    target = torch.zeros(1, 512, device=DEVICE)
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    dequantise_experts(narrow, source.to(DEVICE), target, zero, zero)
    expected = torch.cat(narrow.dequantise(source, torch.float32), -1).flatten()
    assert torch.equal(target[0].cpu(), expected)
    assert len(target[0, :256].unique()) == 253  # all others differ, but for the two zeros
