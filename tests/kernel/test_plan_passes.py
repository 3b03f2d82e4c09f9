"""Slots chosen by a kernel, in Triton's interpreter where there is no GPU."""

import os
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.kernels.plan_passes import POLICIES, plan_passes  # noqa: E402
from hotset.memory.expert_cache import SlotTable  # noqa: E402


def table_of(num_experts: int, num_slots: int, policy: Any, device: str) -> SlotTable:
    counts = torch.zeros(5, dtype=torch.int64, device=device)
    return SlotTable(num_experts, num_slots, eviction=policy, counts=counts)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("num_experts", "num_slots"), [(8, 1), (8, 3), (5, 5), (60, 16), (64, 33), (130, 128)]
)
def test_a_step_leaves_what_begin_and_load_leave(
    policy: str, num_experts: int, num_slots: int
) -> None:
    torch.manual_seed(num_slots)
    expected = table_of(num_experts, num_slots, policy, "cpu")
    got = table_of(num_experts, num_slots, policy, DEVICE)
    for step, num_ids in enumerate((1, 4, 1100, 2, 9, 30, 3, 3)):
        # Some are nobody's, and the others are not used alike.
        ids = (torch.rand(num_ids) ** 2 * (num_experts + 2)).long()
        if step % 3 == 1:
            for table in (expected, got):
                guess = (torch.arange(3) * 2 % num_experts).to(table.state.device)
                table.prefetch(guess, 1)
        lists = plan_passes(
            got.state,
            got._counts,
            ids.to(DEVICE),
            num_experts=num_experts,
            num_slots=num_slots,
            num_passes=got.num_passes(num_ids),
            policy=policy,
        )
        wanted = expected.plan(ids)
        for one, other in zip(lists, wanted, strict=True):
            assert torch.equal(one.cpu(), other)
        # What nobody reads may hold anything.
        assert torch.equal(got._arrival[:-1].cpu(), expected._arrival[:-1])
        got._arrival[-1] = expected._arrival[-1]
        assert torch.equal(got.state.cpu(), expected.state)
        assert torch.equal(got._counts.cpu(), expected._counts)
        got.check()
