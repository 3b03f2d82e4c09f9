"""What decodes select is noted, whatever the backend and whether steps are recorded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engines import run
from fake_flashinfer import FakeRecorder
from test_simulated import use_kernels
from tiny_models import make_model

from hotset.attention.sparse import recorder as module
from hotset.attention.sparse.recorder import SelectionRecorder
from hotset.attention.sparse.select import select_positions
from hotset.engine import rank_setup
from hotset.engine.engine import Engine
from hotset.executor import graphs
from hotset.executor.probe import inspect_model
from hotset.executor.simulated import Simulated

MakeEngine = Callable[..., Engine]
CHANGES: dict[str, Any] = {"kv_lora_rank": 72, "mlp_layer_types": ["dense"] * 3}
PROMPTS = [list(range(10, 40)), list(range(60, 66)), list(range(70, 120))]
NUM_TOKENS, SELECTED = 14, 16


def recorded(make_engine: MakeEngine, **options: Any) -> tuple[SelectionRecorder, Engine]:
    layers = inspect_model(make_model("glm_moe_dsa", **CHANGES)).layers
    recorder = SelectionRecorder(layers, num_rows=6, device=torch.device("cpu"))
    simulated = Simulated(recorder=recorder)
    engine = make_engine(
        "glm_moe_dsa", model_changes=CHANGES, simulated=simulated, max_num_seqs=6, **options
    )
    return recorder, engine


def assert_all_noted(recorder: SelectionRecorder) -> list[np.ndarray]:
    found = recorder.requests()
    # The first two select from their first decode on, or once they have more than 16 tokens.
    assert [each.shape for each in found] == [
        (NUM_TOKENS - 1, 2, SELECTED),  # the last token is not computed
        (NUM_TOKENS - 1, 2, SELECTED),
        (6 + NUM_TOKENS - 1 - SELECTED, 2, SELECTED),
    ]
    for each in found:
        assert (np.diff(each, axis=2) > 0).all() and each.min() >= 0
        assert (each[..., -1].max(1) <= each.shape[0] + 63).all()
    return found


@pytest.mark.parametrize("overlap", [False, True])
def test_each_decode_that_selects_is_noted_once(overlap: bool, make_engine: MakeEngine) -> None:
    recorder, engine = recorded(make_engine, overlap=overlap)
    run(engine, PROMPTS, max_tokens=NUM_TOKENS)
    assert not recorder.requests()  # until it is on
    recorder.is_on = True
    run(engine, PROMPTS, max_tokens=NUM_TOKENS)
    assert_all_noted(recorder)


def test_what_is_noted_is_what_scores_say(make_engine: MakeEngine, monkeypatch: Any) -> None:
    chosen = []

    def select(scores: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
        found = select_positions(scores, lengths, count)
        if len(scores) == 1:
            chosen.append(found[0].numpy())
        return found

    monkeypatch.setattr("hotset.attention.sparse.gathered.select_positions", select)
    recorder, engine = recorded(make_engine)
    recorder.is_on = True
    run(engine, PROMPTS[:1], max_tokens=NUM_TOKENS)
    [found] = recorder.requests()
    assert np.array_equal(found.reshape(-1, SELECTED), np.stack(chosen))


def test_recorded_steps_note_the_same(make_engine: MakeEngine, monkeypatch: Any) -> None:
    plain, engine = recorded(make_engine)
    plain.is_on = True
    run(engine, PROMPTS, max_tokens=NUM_TOKENS)
    monkeypatch.setattr(rank_setup, "pack_linears", lambda model: None)
    use_kernels(monkeypatch)
    monkeypatch.setattr(graphs, "GraphRecorder", FakeRecorder)
    recorder, engine = recorded(make_engine)
    runner = engine.executor.runner  # type: ignore[attr-defined]
    runner.record(max_num_tokens=64, max_context_blocks=24, scratch_block=engine.sizes.num_blocks)
    recorder.is_on = True
    run(engine, PROMPTS, max_tokens=NUM_TOKENS)
    for one, other in zip(assert_all_noted(plain), assert_all_noted(recorder), strict=True):
        assert np.array_equal(one, other)


def test_a_record_is_bounded(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 2 * 5 * 4 * 2 * SELECTED)
    monkeypatch.setattr(module, "MOST_STEPS", 5)
    recorder, engine = recorded(make_engine)
    recorder.is_on = True
    run(engine, PROMPTS, max_tokens=NUM_TOKENS)
    assert [len(each) for each in recorder.requests()] == [5, 5]
