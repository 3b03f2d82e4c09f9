"""An engine whose steps cost time on a clock of their own, and compute nothing."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.lane import Lane
from hotset.engine.outputs import OutputProcessor
from hotset.engine.parts import EngineParts
from hotset.engine.scheduler import Scheduler
from hotset.engine.step_cost import StepCost
from hotset.executor.step_input import StepInput, StepResult
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import RequestOutput, SamplingParams


class PlayedClock:
    """Seconds that pass when steps take them."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        """See `Clock`."""
        return self.now_s


class PlayedStep:
    """A step that has ended; see `Pending`."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        """Its tokens, which are all 0."""
        return self._result


class PlayedExecutor:
    """See `Executor`. Steps take what `step_s` says, and are kept in `seconds`."""

    is_warming = False

    def __init__(
        self, vocab_size: int, clock: PlayedClock, step_s: Callable[[StepInput], float]
    ) -> None:
        self.vocab_size = vocab_size
        self.seconds: list[float] = []
        self.clock, self._step_s = clock, step_s

    def submit(self, steps: Sequence[StepInput], when_ready: Callable[[], None]) -> PlayedStep:
        """See `Executor`."""
        when_ready()
        [step] = steps
        seconds = self._step_s(step)
        self.clock.now_s += seconds
        self.seconds.append(seconds)
        num_rows = len(step.sample.sequences)
        return PlayedStep(StepResult([0] * num_rows, [None] * num_rows, {}, [], seconds))

    def copy_blocks(self, copies: Sequence[Sequence[tuple[int, int]]]) -> None:
        """See `Executor`."""

    def validate(self, params: SamplingParams, answers: Sequence[Sequence[int]] = ()) -> None:
        """See `Executor`."""

    def release(self, sequence_id: int) -> None:
        """See `Executor`."""

    def warm_up(self) -> bool:
        """See `Executor`."""
        return False

    def expert_counts(self) -> None:
        """See `Executor`."""

    def hot_counts(self) -> None:
        """See `Executor`."""

    def take_faults(self) -> Counter[str]:
        """See `Executor`."""
        return Counter()

    def record_routing(self, recorder: Any) -> None:
        """See `Executor`."""

    def close(self) -> None:
        """See `Executor`."""


class PlayedEngine(Engine):
    """Notes when requests were sent, and when their tokens came."""

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self.sent_s: dict[str, float] = {}
        self.tokens_s: dict[str, list[float]] = {}

    def add_request(self, *prompt: Any, **options: Any) -> str:
        """See `Engine`."""
        request_id = super().add_request(*prompt, **options)
        self.sent_s[request_id] = self._clock.now()
        return request_id

    def step(self, *, num_queued: int = 0) -> list[RequestOutput]:
        """See `Engine`. Copies to and from host memory take no time: they end first."""
        while self.has_transfers and self.sizes.disk_bytes == 0:
            assert self.tiers is not None
            self.tiers.flush()
            self.tiers.wait(0.01)
            self.kv.poll()
        outputs = super().step(num_queued=num_queued)
        for output in outputs:
            if output.token_ids:
                self.tokens_s.setdefault(output.request_id, []).append(self._clock.now())
        return outputs


def make_engine(
    options: Options,
    loaded: LoadedModel,
    step_s: Callable[[StepInput], float],
    *,
    vocab_size: int,
    trials: list[tuple[int, float]],
    row_tile: int,
) -> tuple[PlayedEngine, PlayedExecutor]:
    """Real KV cache and tiers of a stand-in, with a scheduler as on a GPU."""
    real = build_engine(options, loaded)
    clock, step_cost = PlayedClock(), StepCost(trials)
    executor = PlayedExecutor(vocab_size, clock, step_s)
    schedule = options.schedule
    scheduler = Scheduler(
        real.kv,
        metrics=real.metrics,
        max_num_seqs=schedule.max_num_seqs,
        max_num_batched_tokens=schedule.max_num_batched_tokens,
        max_mixed_tokens=real.scheduler.max_mixed_tokens,
        bursts=True,
        row_tile=row_tile,
        rotation_s=schedule.rotation_s,
        step_cost=step_cost,
        clock=clock,
    )
    parts = EngineParts(
        options=options,
        sizes=real.sizes,
        report=real.report,
        numerics=real.numerics,
        overlaps=False,
        executor=executor,
        outputs=OutputProcessor(None, ()),
        lanes=[Lane(scheduler, real.tiers)],
        rates=real.rates,
        step_cost=step_cost,
        experts=None,
        mover=None,
        clock=clock,
    )
    return PlayedEngine(parts), executor
