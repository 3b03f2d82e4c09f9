"""Slots chosen by a kernel, in Triton's interpreter where there is no GPU."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.eviction import POLICIES, By, Policy  # noqa: E402
from hotset.experts.residency import SlotTable  # noqa: E402
from hotset.kernels.plan_passes import plan_passes  # noqa: E402

# No row of the registry counts uses so: a new row needs nothing else.
NEW = Policy(By.NUM_USES, largest_first=True, spares_current=True)


def table_of(
    num_experts: int, num_slots: int, policy: str, device: str, fewest: int | None = None
) -> SlotTable:
    counts = torch.zeros(5, dtype=torch.int64, device=device)
    return SlotTable(num_experts, num_slots, eviction=policy, counts=counts, fewest=fewest)


def move(tables: tuple[SlotTable, SlotTable], fewest: int, rng: random.Random) -> None:
    """Take another number of slots in use, `fewest` or more, in both tables."""
    num_slots = rng.randint(fewest, tables[0].num_slots)
    for table in tables:
        if num_slots < table.num_active:
            table.shrink(num_slots)
        while num_slots > table.num_active:
            table.grow()
        table.check()


# Every policy is code of its own. What large sizes change is the same in all of them.
CASES = [
    (policy, num_experts, num_slots)
    for num_experts, num_slots in [(8, 1), (8, 3), (5, 5), (60, 16), (64, 33), (130, 128)]
    for policy in ([*POLICIES, "new"] if num_experts < 64 else ["lru", "new"])
]


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(("policy", "num_experts", "num_slots"), CASES)
def test_a_step_leaves_what_begin_and_load_leave(
    policy: str, num_experts: int, num_slots: int, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "new", NEW)
    torch.manual_seed(num_slots)
    fewest = -(-num_slots // 3) if moves else None
    expected = table_of(num_experts, num_slots, policy, "cpu", fewest)
    got = table_of(num_experts, num_slots, policy, DEVICE, fewest)
    rng = random.Random(num_slots)
    for step, num_ids in enumerate((1, 4, 1100, 2, 9, 30, 3, 3)):
        # Ids of E and E + 1 belong to no expert, and low ids come more often.
        ids = (torch.rand(num_ids) ** 2 * (num_experts + 2)).long()
        if fewest is not None:
            move((expected, got), fewest, rng)
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
            policy=POLICIES[policy],
        )
        wanted = expected.arrange(ids)
        for one, other in zip(lists, wanted, strict=True):
            assert torch.equal(one.cpu(), other)
        # The entry beyond the last slot is never read.
        assert torch.equal(got._arrival[:-1].cpu(), expected._arrival[:-1])
        got._arrival[-1] = expected._arrival[-1]
        assert torch.equal(got.state.cpu(), expected.state)
        assert torch.equal(got._counts.cpu(), expected._counts)
        got.check()
