"""What an engine runs with. Imports numpy, no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotset.clock import Clock
from hotset.cost.rates import Rates
from hotset.engine.lane import Lane
from hotset.engine.outputs import OutputProcessor
from hotset.engine.sizing import Sizes
from hotset.engine.step_cost import StepCost
from hotset.executor.executor import Executor
from hotset.metrics import RankMemory
from hotset.options import Options

if TYPE_CHECKING:
    from hotset.engine.split_mover import SplitMover
    from hotset.experts.buffer import ExpertBuffer


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine runs with, all of it ready. Made by `engine.build`.

    Attributes:
        options: as the user asked.
        sizes: what they come to here.
        report: what went where, to be told at start.
        numerics: what the last bits of what steps compute depend on, beside the weights.
        overlaps: whether one step is prepared while the last one runs.
        executor: runs the steps.
        lanes: have the requests, all with the same `metrics`.
        experts: None where all stay on the device as they were loaded.
        mover: None where the split between experts and KV stays.
        memory: gives what each rank has of the memory, as it said last.
        clock: of the schedulers too.
    """

    options: Options
    sizes: Sizes
    report: str
    numerics: str
    overlaps: bool
    executor: Executor
    outputs: OutputProcessor
    lanes: Sequence[Lane]
    rates: Rates
    step_cost: StepCost
    experts: "ExpertBuffer | None"
    mover: "SplitMover | None"
    memory: Callable[[], Sequence[RankMemory]]
    clock: Clock
