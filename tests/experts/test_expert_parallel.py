"""Two ranks, each with some of the experts, compute what one rank with all of them computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_model
from torch import distributed, multiprocessing

from hotset.errors import ConfigError
from hotset.experts.gating import pack_experts, use_dynamic_gating
from hotset.experts.parallel import LocalIds, shard_experts
from hotset.experts.placement import Placement, in_order, place, round_robin
from hotset.experts.weights import experts_layers

TOKENS = torch.randint(3, 256, (2, 11), generator=torch.Generator().manual_seed(0))
UNEVEN = Placement(((0, 2, 3, 5, 7), (1, 2, 4, 6, 7)))  # 2 and 7 are on both


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 6),
    st.lists(st.lists(st.integers(0, 40), min_size=8, max_size=8), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_each_route_is_computed_by_one_rank_with_the_right_expert(
    num_ranks: int, num_replicas: int, history: list[list[int]], num_tokens: int
) -> None:
    placement = place(history, num_ranks, num_replicas=num_replicas)
    torch.manual_seed(0)
    ids = torch.randint(0, 8, (num_tokens, 3))
    taken = torch.zeros_like(ids)
    for rank in range(num_ranks):
        local_ids = LocalIds(placement, rank, torch.device("cpu"))
        local = local_ids(ids)
        is_mine = local < len(local_ids.experts)
        taken += is_mine
        held = torch.tensor([*local_ids.experts, -1])
        assert torch.equal(held[local][is_mine], ids[is_mine])
        assert (local[~is_mine] == len(local_ids.experts)).all()
    assert (taken == 1).all()


def test_the_tokens_of_an_expert_with_copies_are_dealt_out() -> None:
    ids = torch.full((6, 1), 7)
    mine = [(LocalIds(UNEVEN, rank, torch.device("cpu"))(ids) < 5).sum().item() for rank in (0, 1)]
    assert mine == [3, 3]


def _logits(family: str, placements: list[Placement] | None, *, packed: bool) -> torch.Tensor:
    model = make_model(family)
    use_dynamic_gating(model)
    before = sum(p.nbytes for each in experts_layers(model) for p in each.module.parameters())
    freed_bytes = shard_experts(model, placements)
    after = sum(p.nbytes for each in experts_layers(model) for p in each.module.parameters())
    assert freed_bytes == before - after > 0
    if packed:
        pack_experts(model)
    with torch.inference_mode():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    try:
        refused = []
        for placements in ([UNEVEN], [round_robin(8, 3)] * 3, [in_order(9, 2)] * 3):
            model = make_model("qwen3_moe")
            use_dynamic_gating(model)
            try:
                shard_experts(model, placements)
            except ConfigError as error:
                refused.append(str(error))
        found: dict[str, Any] = {
            "in order": _logits("qwen3_moe", None, packed=False),
            "uneven": _logits("qwen3_moe", [UNEVEN, round_robin(8, 2), UNEVEN], packed=False),
            "packed": _logits("qwen3_moe", [UNEVEN] * 3, packed=True),
            "gpt_oss": _logits("gpt_oss", [Placement(((0, 1, 3), (2, 3)))] * 3, packed=False),
            "refused": refused,
        }
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_ranks_give_the_logits_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for case in ("in order", "uneven", "packed", "gpt_oss"):
        model = make_model(case if case == "gpt_oss" else "qwen3_moe")
        with torch.inference_mode():
            expected = model(TOKENS).logits  # transformers' own experts
        torch.testing.assert_close(zero[case], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(zero[case], one[case])
    for message, found in zip(
        ("1 placements are given for 3", "for 3 devices and there are 2", "not of its 8 experts"),
        zero["refused"],
        strict=True,
    ):
        assert message in found


def _gpu_rank(rank: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    try:
        found = []
        for placements in (None, [UNEVEN, round_robin(8, 2), UNEVEN]):
            model = make_model("qwen3_moe", head_dim=128, moe_intermediate_size=128)
            model = model.to(device, torch.bfloat16)
            use_dynamic_gating(model)
            if not found:
                with torch.inference_mode():
                    found.append(model(TOKENS.to(device)).logits.cpu())
            shard_experts(model, placements)
            with torch.inference_mode():
                found.append(model(TOKENS.to(device)).logits.cpu())
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_logits_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_gpu_rank, args=(str(tmp_path),), nprocs=2)
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone, *shared = (logits.float() for logits in zero)
    for ours, theirs, logits in zip(zero[1:], one[1:], shared, strict=True):
        assert torch.equal(ours, theirs)
        assert 0 < float((logits - alone).norm() / alone.norm()) < 2e-2  # bfloat16, summed apart


def test_a_model_without_experts_has_none_to_spread() -> None:
    with pytest.raises(ConfigError, match="no experts"):
        shard_experts(make_model("llama"))
