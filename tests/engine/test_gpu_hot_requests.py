"""Hot requests on an NVIDIA GPU of the kind Hopper: run these there with `pytest -m gpu`."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engines import logits_of, run
from tiny_models import SPARSE_FAMILIES, WIDE_SPARSE, make_model

from hotset.attention.flashinfer.sparse import SparseBackend
from hotset.attention.sparse.drawn import DrawnSelection
from hotset.attention.sparse.recorder import SelectionRecorder
from hotset.cost.cache_spec import KEYS_ALONE
from hotset.engine.engine import Engine
from hotset.executor.probe import inspect_model
from hotset.executor.simulated import Simulated
from hotset.request import SamplingParams

MakeEngine = Callable[..., Engine]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

BLOCK, SLOTS = 16, 64


def make_wide(make_engine: MakeEngine, family: str, **changes: Any) -> Engine:
    options = {
        "device": "cuda",
        "model_dtype": torch.float16,
        "model_changes": WIDE_SPARSE,
        "kv_bytes": 2,
        "block_size": BLOCK,
        "hot_tokens": SLOTS,
        "host_blocks": 400,
        "hot_blocks": 300,
        "max_model_len": 640,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 1024,  # all prompts of a test in one step, so that batches agree
        **changes,
    }
    engine = make_engine(family, **options)
    assert type(engine.executor.runner._attention) is SparseBackend
    return engine


def prompts_of(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 256) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
@pytest.mark.parametrize(
    ("eager", "row_prefetch", "drawn", "index_dtype"),
    [
        (False, 0, False, "auto"),
        (True, 0, False, "auto"),
        (False, 1, False, "auto"),
        (False, 0, True, "auto"),
        (True, 0, True, "auto"),
        (False, 0, False, "fp8"),
        (True, 0, False, "fp8"),
        (False, 1, True, "fp8"),
        (False, 2, False, "auto"),
        (True, 2, False, "auto"),
        (False, 2, True, "auto"),
        (False, 2, False, "fp8"),
        (True, 2, True, "fp8"),
    ],
)
def test_logits_of_hot_and_resident_requests_are_the_same_bits(
    family: str,
    eager: bool,
    row_prefetch: int,
    drawn: bool,
    index_dtype: str,
    make_engine: MakeEngine,
) -> None:
    options: dict[str, Any] = {
        "eager": eager,
        "row_prefetch": row_prefetch,
        "index_dtype": index_dtype,
    }
    if drawn:  # as benchmarks have it
        selection = DrawnSelection.of_overlap(0.4, context=300, count=24)
        options["simulated"] = Simulated(selection, places_prompts=True)
    assert_same_bits(make_engine, family, **options)


@pytest.mark.parametrize("row_prefetch", [0, 1, 2])
def test_rows_of_layers_that_share_a_selection_come_at_once_or_in_parts(
    row_prefetch: int, make_engine: MakeEngine
) -> None:
    """Of six layers four share a selection, then two."""
    changes = {
        **WIDE_SPARSE,
        "num_hidden_layers": 6,
        "indexer_types": ["full", "shared", "shared", "shared", "full", "shared"],
        "mlp_layer_types": ["dense"] * 6,
    }
    assert_same_bits(make_engine, "glm_moe_dsa", row_prefetch=row_prefetch, model_changes=changes)


def assert_same_bits(make_engine: MakeEngine, family: str, **options: Any) -> None:
    """Over 100 steps of the same batches, so that what was generated is fetched as well."""
    prompts = prompts_of([SLOTS - 1, SLOTS, SLOTS + 1, SLOTS + BLOCK, 200, 431])
    engines = [make_wide(make_engine, family, **options) for _ in range(2)]
    assert (engines[1].executor.runner._graphs is None) == options.get("eager", False)
    resident, hot = (
        logits_of(engine, prompts, max_tokens=100, turn=turn)
        for engine, turn in zip(engines, (False, True), strict=True)
    )
    assert engines[1].metrics.turned_hot == 6 and not engines[0].metrics.turned_hot
    assert len(resident) == len(hot) >= 100
    for number, (one, other) in enumerate(zip(resident, hot, strict=True)):
        assert torch.equal(one, other), f"step {number}"
    engine = engines[1]
    engine.take_counts()
    assert engine.metrics.hot_hits > 1000 and engine.metrics.hot_misses > 1000
    assert (engine.metrics.hot_guessed_right > 100) == (options.get("row_prefetch") == 2)
    assert engine.kv.pool.num_held == 0 or engine.has_transfers


def test_what_is_selected_is_noted_in_recorded_steps_as_in_launched_ones(
    make_engine: MakeEngine,
) -> None:
    """Selections are drawn, and contexts placed, so that no rounding changes them."""
    drawn = DrawnSelection.of_overlap(0.4, context=300, count=24)
    layers = inspect_model(make_model("glm_moe_dsa", **WIDE_SPARSE)).layers
    noted = []
    for eager in (True, False):
        recorder = SelectionRecorder(layers, num_rows=8, device=torch.device("cuda"))
        simulated = Simulated(drawn, places_prompts=True, recorder=recorder)
        engine = make_wide(make_engine, "glm_moe_dsa", eager=eager, simulated=simulated)
        assert (engine.executor.runner._graphs is None) == eager
        recorder.is_on = True
        run(engine, prompts_of([20, 200, 431]), max_tokens=40)
        noted.append(recorder.requests())
    assert [len(each) for each in noted[0]] == [39, 39, 35]
    for one, other in zip(*noted, strict=True):
        assert (one == other).all()
        assert (np.diff(one, axis=2) > 0).all() and one.min() >= 0


def test_requests_turn_hot_where_memory_is_short_and_give_all_back(
    make_engine: MakeEngine,
) -> None:
    """Answers are compared where they are clear: ties of float16 break as batches differ."""
    prompts = prompts_of([300, 320, 280, 333, 310, 290])
    expected = run(make_wide(make_engine, "glm_moe_dsa", hot_tokens=0), prompts, max_tokens=16)
    engine = make_wide(make_engine, "glm_moe_dsa", hot_blocks=64)
    answers = run(engine, prompts, max_tokens=16)
    assert engine.metrics.turned_hot > 1 and engine.metrics.preemptions == 0
    pairs = [
        pair
        for answer, wanted in zip(answers, expected, strict=True)
        for pair in zip(answer, wanted, strict=True)
    ]
    assert sum(one == other for one, other in pairs) >= 0.6 * len(pairs)
    while engine.has_transfers:
        engine.step()
    engine.kv.poll()
    engine.kv.check()
    assert engine.kv.pool.num_held == 0


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_index_keys_of_a_request_that_goes_on_hot_are_those_that_it_had(
    family: str, make_engine: MakeEngine
) -> None:
    [prompt] = prompts_of([300])
    engine = make_wide(make_engine, family)
    arena, hot = engine.executor.runner._arena, engine.kv.hot  # type: ignore[attr-defined]
    assert hot is not None
    engine.add_request(prompt, SamplingParams(max_tokens=60, ignore_eos=True))

    def step_until(is_so: Callable[[], bool]) -> None:
        for _ in range(500):
            engine.step()
            if is_so():
                return
        raise AssertionError("it never was")

    step_until(lambda: any(map(hot.turn_hot, engine.scheduler.running)))
    [request] = engine.scheduler.running
    step_until(lambda: request.num_output_tokens == 30)
    num_full = request.kv.num_computed_tokens // BLOCK
    step_until(lambda: request.kv.num_index_blocks >= num_full)

    def index_keys() -> list[torch.Tensor]:
        numbers = [block & ~KEYS_ALONE for block in request.kv.block_table[:num_full]]
        keys = (part for part in arena.index_keys if part.numel())
        return [part.view(torch.uint8)[numbers].cpu() for part in keys]

    before, table = index_keys(), request.kv.block_table[:num_full]
    engine.scheduler._preempt_last()
    step_until(lambda: request.kv.seat is not None and request.kv.num_computed_tokens > 300)
    assert request.kv.block_table[:num_full] != table
    assert all(map(torch.equal, index_keys(), before)) and any(keys.any() for keys in before)
    step_until(lambda: not engine.has_work)
    assert len(request.output_ids) == 60 and request.error is None
