"""Rows by expert, in Triton's interpreter where there is no GPU."""

import pytest
import torch

from hotset.kernels.expert_routing import Routing, route_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(routing: Routing, ids: torch.Tensor, num_experts: int, block_rows: int) -> None:
    """Every row is in one block of its expert, and nobody's rows are in none."""
    order = torch.sort(ids, stable=True).indices
    num_mine = int((ids < num_experts).sum())
    assert torch.equal(routing.rows[:num_mine].long(), order[:num_mine])
    expected, start = [], 0
    for expert, count in enumerate(ids.cpu().bincount(minlength=num_experts)[:num_experts]):
        end = start + int(count)
        expected += [
            [expert, at, min(at + block_rows, end)] for at in range(start, end, block_rows)
        ]
        start = end
    assert len(expected) <= len(routing.blocks)
    assert routing.num_blocks.tolist() == [len(expected)]
    assert routing.blocks[: len(expected)].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize(
    ("num_rows", "num_experts", "num_ids"),
    [
        (1, 1, 1),
        (8, 128, 128),
        (100, 6, 9),
        (2048, 8, 8),
        (2049, 5, 5),
        (5000, 7, 16),
        (20000, 5, 7),
    ],
)
def test_rows_are_sorted_by_expert_and_cut_into_blocks(
    num_rows: int, num_experts: int, num_ids: int, block_rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(num_rows)
    ids = torch.randint(0, num_ids, (num_rows,), device=DEVICE).to(dtype)
    check(route_rows(ids, num_experts, block_rows), ids, num_experts, block_rows)


@pytest.mark.parametrize("expert", [0, 3, 4, 1000])
def test_all_rows_may_be_of_one_expert_or_of_none(expert: int) -> None:
    ids = torch.full((70,), expert, device=DEVICE)
    check(route_rows(ids, 4, 16), ids, 4, 16)


@pytest.mark.parametrize("num_rows", [8192, 8193, 2048 * 17 + 3])
def test_many_rows_are_counted_first(num_rows: int) -> None:
    """One expert has no row in most chunks, one all rows of the last."""
    ids = torch.arange(num_rows, device=DEVICE) % 3
    ids[-3:] = 3
    ids[5000:5100] = 4
    check(route_rows(ids, 4, 128), ids, 4, 128)


def test_blocks_fit_where_every_expert_leaves_one_unfilled() -> None:
    ids = torch.arange(5, device=DEVICE).repeat_interleave(17)
    routing = route_rows(ids, 5, 16)
    check(routing, ids, 5, 16)
    assert routing.num_blocks.item() == len(routing.blocks)


def test_no_rows_are_no_blocks() -> None:
    ids = torch.empty(0, dtype=torch.int64, device=DEVICE)
    check(route_rows(ids, 4, 16), ids, 4, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [8, 128, 512])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 256, 1024, 8192])
def test_rows_of_real_models_are_sorted_on_a_gpu(num_tokens: int, num_experts: int) -> None:
    scores = torch.randn(num_tokens, num_experts + 5, device="cuda")
    ids = scores.topk(8).indices.reshape(-1)
    check(route_rows(ids, num_experts, 16), ids, num_experts, 16)
