"""The engine over an executor that computes nothing: no model, no torch."""

from fakes import FakeClock, FakeExecutor
from schedulers import BLOCK, make_scheduler

from hotset.cost.rates import Rates
from hotset.engine.engine import Engine, EngineParts
from hotset.engine.outputs import OutputProcessor
from hotset.engine.sizing import Sizes
from hotset.engine.step import Step
from hotset.engine.step_cost import StepCost
from hotset.options import Options
from hotset.request import FinishReason, SamplingParams
from hotset.sequence import Kind


def make_engine(executor: FakeExecutor) -> Engine:
    clock, scheduler = FakeClock(), make_scheduler(num_blocks=16)
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
        report="",
        overlaps=False,
        executor=executor,  # type: ignore[arg-type]
        outputs=OutputProcessor(None, ()),
        scheduler=scheduler,
        rates=Rates(1.0, {}),
        step_cost=StepCost([(1, 0.01), (8, 0.02)]),
        experts=None,
        tiers=None,
        mover=None,
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
    kinds = [step.kinds for step in executor.steps]
    assert kinds == [[Kind.PROMPT] * 2, [Kind.DECODE] * 2, [Kind.DECODE] * 2]


def test_copies_of_blocks_are_made_where_a_step_has_nothing_to_compute() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    engine._submit(Step([], [(3, 20), (4, 21)]))
    assert executor.copies == [(3, 20), (4, 21)] and not executor.steps
