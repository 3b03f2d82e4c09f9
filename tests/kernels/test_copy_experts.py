"""Copies of experts, in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.kernels.copy_experts import copy_experts  # noqa: E402


@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("beside_compute", [False, True])
@pytest.mark.parametrize("num_bytes", [8, 4096, 16384 * 3 + 8, 16384 * 40])
def test_the_experts_asked_for_are_copied_and_nothing_else_changes(
    num_bytes: int, beside_compute: bool, is_strided: bool
) -> None:
    torch.manual_seed(0)
    source = torch.randint(0, 256, (9, num_bytes), dtype=torch.uint8)
    if DEVICE == "cuda":
        source = source.pin_memory()
    size = (8, 3 if is_strided else 1, num_bytes)
    memory = torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE)
    target, whole = memory[:, -1], memory.clone()
    expected = whole[:, -1]
    pairs = [(5, 1), (0, 3), (-1, 0), (-1, 2), (8, 7), (3, 0), (-1, 4)]
    experts, slots = torch.tensor(pairs, device=DEVICE).T.contiguous()

    copy_experts(source, target, experts, slots, beside_compute=beside_compute)

    for expert, slot in pairs:
        if expert >= 0:
            expected[slot] = source[expert].to(DEVICE)
    assert torch.equal(memory, whole)


def test_no_copies_are_none() -> None:
    target = torch.zeros(1, 8, dtype=torch.uint8, device=DEVICE)
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    copy_experts(torch.ones(1, 8, dtype=torch.uint8), target, nothing, nothing)
    assert not target.any()
