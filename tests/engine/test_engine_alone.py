"""The engine over an executor that computes nothing: no model, no torch."""

import numpy as np
from fakes import FakeClock, FakeExecutor
from schedulers import BLOCK, make_scheduler

from hotset.attention.batch import Batch, SequenceSpan
from hotset.cost.rates import Rates
from hotset.engine.engine import Engine
from hotset.engine.lane import Lane
from hotset.engine.outputs import OutputProcessor
from hotset.engine.parts import EngineParts
from hotset.engine.sizing import Sizes
from hotset.engine.step import Step
from hotset.engine.step_cost import StepCost
from hotset.executor.step_input import SampleInput, StepInput
from hotset.metrics import Metrics
from hotset.options import Options
from hotset.request import FinishReason, SamplingParams
from hotset.sequence import Kind


def make_engine(executor: FakeExecutor, *, num_lanes: int = 1) -> Engine:
    clock, metrics = FakeClock(), Metrics()
    schedulers = [make_scheduler(num_blocks=16, metrics=metrics) for _ in range(num_lanes)]
    sizes = Sizes(
        weights_bytes=0,
        workspace_bytes=0,
        block_bytes=1,
        block_size=BLOCK,
        num_blocks=16,
        first_block=0,
        host_slots=0,
        disk_bytes=0,
        max_model_len=64,
        max_mixed_tokens=16,
    )
    parts = EngineParts(
        options=Options.of(),
        sizes=sizes,
        numerics="",
        report="",
        overlaps=False,
        executor=executor,  # type: ignore[arg-type]
        outputs=OutputProcessor(None, ()),
        lanes=[Lane(scheduler, None) for scheduler in schedulers],
        rates=Rates(1.0, {}),
        step_cost=StepCost([(1, 0.01), (8, 0.02)]),
        experts=None,
        mover=None,
        memory=tuple,
        clock=clock,
    )
    return Engine(parts)


def test_requests_run_to_their_ends_over_any_executor() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    ids = [engine.add_request([1, 2, 3, i], SamplingParams(max_tokens=3)) for i in range(2)]
    tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
    ends = {}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            ends[output.request_id] = output.finish_reason
    assert list(tokens.values()) == [[10, 11, 12]] * 2
    assert set(ends.values()) == {FinishReason.LENGTH}
    assert len(executor.released) == 2 and engine.kv.pool.num_held == 0
    kinds = [step.kinds for [step] in executor.submitted]
    assert kinds == [[Kind.PROMPT] * 2, [Kind.DECODE] * 2, [Kind.DECODE] * 2]


def test_copies_of_blocks_are_made_where_a_step_has_nothing_to_compute() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    engine._submit([Step([], [(3, 20), (4, 21)])])
    assert executor.copies == [(3, 20), (4, 21)] and not executor.submitted


def run(engine: Engine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


def test_a_request_goes_to_the_lane_with_the_fewest_tokens_or_with_its_prefix() -> None:
    engine = make_engine(FakeExecutor(), num_lanes=2)
    params = SamplingParams(max_tokens=2)
    prompts = [[1] * 20, [2] * 12, [3] * 10, [4] * 5]
    for prompt in prompts:
        engine.add_request(prompt, params)
    assert [[r.prompt_len for r in lane.scheduler.waiting] for lane in engine.lanes] == [
        [20, 5],
        [12, 10],
    ]
    assert set(map(tuple, run(engine).values())) == {(10, 11)}
    assert [lane.kv.pool.num_held for lane in engine.lanes] == [0, 0]
    # Both are empty again: the second one has the prefix.
    engine.add_request([2] * 8 + [7], params)
    assert [len(lane.scheduler.waiting) for lane in engine.lanes] == [0, 1]
    # Not for any number of tokens.
    engine.add_request([2] * 8 + [8], params)
    engine.add_request([2] * 8 + [9], params)
    assert [len(lane.scheduler.waiting) for lane in engine.lanes] == [1, 2]
    run(engine)
    assert engine.metrics.cached_tokens["device"] == 16


def test_a_lane_without_work_has_a_step_of_nothing() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor, num_lanes=3)
    first = engine.add_request([1, 2, 3, 4], SamplingParams(max_tokens=3))
    second = engine.add_request([5], SamplingParams(max_tokens=1))
    assert run(engine) == {first: [10, 11, 12], second: [10]}
    counts = [[step.num_tokens for step in steps] for steps in executor.submitted]
    assert counts == [[4, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert len(executor.released) == 2
    assert engine.metrics.computed_tokens == 7


def test_outputs_of_one_request_share_a_lane_and_can_be_ended() -> None:
    engine = make_engine(FakeExecutor(), num_lanes=2)
    engine.add_request([1, 2, 3, 4, 5], SamplingParams(max_tokens=9, n=3))
    other = engine.add_request([6] * 4, SamplingParams(max_tokens=9))
    for _ in range(3):
        engine.step()
    assert [len(lane.scheduler.running) for lane in engine.lanes] == [3, 1]
    engine.abort(other)
    assert [len(lane.scheduler.running) for lane in engine.lanes] == [3, 0]
    run(engine)
    assert engine.metrics.forked_tokens > 0
    assert [lane.kv.pool.num_held for lane in engine.lanes] == [0, 0]


def test_what_attention_takes_is_told_by_the_lane_with_the_most_tokens_of_prompts() -> None:
    def message(num_decodes: int, *prompts: SequenceSpan) -> StepInput:
        nothing = np.empty(0, np.int64)
        spans = [SequenceSpan(i, 1, 9, []) for i in range(num_decodes)] + [*prompts]
        inputs = np.zeros((6, sum(one.num_tokens for one in spans)), np.int64)
        batch = Batch(inputs, nothing, nothing, spans, num_decodes, False)
        return StepInput([], batch, SampleInput())

    engine = make_engine(FakeExecutor(), num_lanes=2)
    engine._observe([message(90), message(3, SequenceSpan(3, 80, 1000, []))], 0.9)
    assert (engine.context_cost.base, engine.context_cost.slope) == (0.01, 0.0)
    assert engine.context_cost._x == 1000 - 80 / 2
