"""The boundary between experts and KV moves on an NVIDIA GPU: run these with `pytest -m gpu`."""

import random
from typing import Any

import pytest
import torch
from engines import reference, run
from expert_layers import MOVABLE
from test_memory_split import FAMILY, engine, slots
from test_split_moves import OPTIONS, check, serve_with_moves
from tiny_models import make_model

from hotset.cost.split_policy import SplitPolicy
from hotset.model.loaded import LoadedModel
from hotset.units import GIB

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
SIZES = {"head_dim": 128, "moe_intermediate_size": 128}
BLOCK_BYTES = 3 * 2 * 16 * 2 * 128 * 2  # 16 tokens of such a model in bfloat16


def on_gpu(dtype: torch.dtype, **changes: Any) -> LoadedModel:
    model = make_model(FAMILY, **changes).to("cuda", dtype)
    return LoadedModel(model, None, FAMILY, FAMILY, (2,), 512)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_launched_steps_answer_as_resident_experts_do_while_the_boundary_moves(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(SplitPolicy, "choose", lambda *args: None)
    hot_gib = (slots(plan=options["expert_plan"])(1) + 6 * slots(plan="cache")(1)) / GIB
    with engine(
        model=on_gpu(torch.float32),
        hot_gib=hot_gib,
        move_split=True,
        expected_users=8,
        eager=True,
        max_num_batched_tokens=256,
        **options,
    ) as made:
        made.scheduler.ahead_tokens = 1  # so that many are preempted
        prompts, answers, seen = serve_with_moves(made, seed=0)
        assert len(seen) > 3 and made.metrics.preemptions > 0
    assert answers == reference(FAMILY, prompts, device="cuda")


@pytest.mark.parametrize("options", MOVABLE, ids=str)
def test_recorded_steps_do_not_depend_on_where_the_boundary_is(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SplitPolicy, "choose", lambda *args: None)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 256) for _ in range(rng.randint(5, 40))] for _ in range(8)]
    # All of them have room wherever it is, so that both engines run the same steps.
    shared = {"block_size": 16, "prefix_caching": False, **options}
    hot_bytes = 116 * BLOCK_BYTES  # 96 are for all 16 users

    with engine(
        model=on_gpu(torch.bfloat16, **SIZES), expert_slots=7, hot_gib=0.01, **shared
    ) as fixed:
        expected = run(fixed, prompts, max_tokens=40)
    with engine(
        model=on_gpu(torch.bfloat16, **SIZES),
        hot_gib=hot_bytes / GIB,
        move_split=True,
        target="latency",
        expected_users=16,
        **shared,
    ) as made:
        mover, experts = made._mover, made.experts
        assert (
            made.executor.runner._graphs is not None and mover is not None and experts is not None
        )
        region, seen = mover._region, set()

        def move() -> None:
            check(made)
            seen.add(experts.num_slots)
            if rng.random() < 0.3:
                mover.aim(rng.randint(region.fewest_slots, region.most_slots))

        assert run(made, prompts, max_tokens=40, each_step=move) == expected
        assert len(seen) > 2 and made.metrics.preemptions == 0
