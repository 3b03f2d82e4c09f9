"""What benchmarks put in place of work is the same for hot and resident requests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import run
from fake_flashinfer import FakeRecorder
from fake_sparse import CpuSparse
from test_hot_requests import WIDE, long_prompts

from hotset.attention.sparse.drawn import DrawnSelection
from hotset.engine import rank_setup
from hotset.engine.engine import Engine
from hotset.errors import ConfigError
from hotset.executor import graphs
from hotset.executor.simulated import Simulated
from hotset.request import SamplingParams

MakeEngine = Callable[..., Engine]
DRAWN = DrawnSelection.of_overlap(0.4, context=64, count=16)


def answers(
    make_engine: MakeEngine, simulated: Simulated | None, family: str = "glm_moe_dsa", **sizes: Any
) -> tuple[list[list[int]], Engine]:
    engine = make_engine(family, model_changes=WIDE, simulated=simulated, **sizes)
    return run(engine, long_prompts(), max_tokens=24), engine


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as a GPU has it, over fakes."""

    def choose(arena: Any, layers: Any, **options: Any) -> CpuSparse:
        del options["kernels"], options["waits"]
        return CpuSparse(arena, layers, **options)

    monkeypatch.setattr(rank_setup, "choose_backend", choose)


HOT = {"hot_blocks": 42, "host_blocks": 200, "hot_tokens": 16}


@pytest.mark.parametrize("places_prompts", [False, True])
@pytest.mark.parametrize("has_kernels", [False, True])
def test_hot_requests_answer_as_resident_ones_whose_selections_are_drawn(
    places_prompts: bool, has_kernels: bool, make_engine: MakeEngine, monkeypatch: Any
) -> None:
    simulated = Simulated(DRAWN, places_prompts)
    resident, _ = answers(make_engine, simulated, hot_blocks=200)
    if has_kernels:
        use_kernels(monkeypatch)
    hot, engine = answers(make_engine, simulated, **HOT)
    assert hot == resident
    assert engine.metrics.turned_hot > 1 and engine.metrics.preemptions == 0
    as_computed, _ = answers(make_engine, None, hot_blocks=200)
    assert resident != as_computed


def test_recorded_steps_draw_anew_each_time_they_are_replayed(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        rank_setup, "pack_linears", lambda model: None
    )  # whose weights no tape takes

    def make() -> Engine:
        return make_engine(
            "glm_moe_dsa",
            model_changes={**WIDE, "mlp_layer_types": ["dense"] * 3},
            simulated=Simulated(DRAWN, places_prompts=True),
            max_num_seqs=6,
        )

    expected = run(make(), long_prompts(), max_tokens=24)
    use_kernels(monkeypatch)
    monkeypatch.setattr(graphs, "GraphRecorder", FakeRecorder)
    engine = make()
    runner = engine.executor.runner  # type: ignore[attr-defined]
    runner.record(max_num_tokens=64, max_context_blocks=24, scratch_block=engine.sizes.num_blocks)
    assert runner._graphs is not None and runner._graphs.is_complete
    assert run(engine, long_prompts(), max_tokens=24) == expected


def test_contexts_are_put_in_place_and_not_computed(make_engine: MakeEngine) -> None:
    prompt = [5, 6, 7, 8] * 6
    found = []
    for others in ([], [[9] * 30]):
        engine = make_engine("deepseek_v32", simulated=Simulated(places_prompts=True))
        for each in (*others, prompt):
            engine.add_request(each, SamplingParams(max_tokens=2))
        engine.step()
        request = engine.scheduler.running[-1]
        arena = engine.executor.runner._arena  # type: ignore[attr-defined]
        table = torch.tensor(request.kv.block_table)
        rows = [part[table].flatten(0, 1)[: len(prompt)] for part in arena.layers]
        rows += [part[table].flatten(0, 1)[: len(prompt)] for part in arena.index_keys]
        found.append(torch.cat(rows, dim=1))
    assert torch.equal(*found)  # wherever they lie
    assert 0.9 < found[0].std() < 1.1
    assert len(found[0].unique(dim=0)) == len(prompt)


def test_a_model_that_attends_to_all_tokens_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"llama has no sparse attention.*dsa-8l"):
        make_engine("llama", simulated=Simulated(places_prompts=True))
