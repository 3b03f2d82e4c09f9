"""Models with a state beside KV, on a GPU."""

from collections.abc import Callable

import pytest
from engines import make_prompts, run
from tiny_models import HYBRID_FAMILIES

from hotset.engine.engine import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_a_gpu_answers_as_the_cpu_does_in_float32(
    family: str, make_engine: Callable[..., Engine]
) -> None:
    prompts = make_prompts()
    expected = run(make_engine(family), prompts)
    engine = make_engine(family, device="cuda", max_num_batched_tokens=24)

    def preempt_one() -> None:
        if len(engine.scheduler.running) > 4:
            engine.scheduler._preempt_last()

    assert run(engine, prompts, each_step=preempt_one) == expected
    assert engine.metrics.preemptions > 0
    long = [prompts[0] + prompts[2] + prompts[4] + prompts[1]]
    assert len(long[0]) > 64
    answer = run(make_engine(family, max_model_len=200), long)
    engine = make_engine(family, device="cuda", max_model_len=200, hot_blocks=400, max_num_seqs=4)
    for _ in range(2):
        assert run(engine, long) == answer
    assert engine.metrics.cached_tokens.total() >= 64
    assert not engine.is_warming
