"""What runs model steps, as the engine sees it. Imports numpy, no torch."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from hotset.executor.step_input import StepInput, StepResult
from hotset.metrics import ExpertCounts, HotCounts
from hotset.request import SamplingParams

if TYPE_CHECKING:
    from hotset.experts.recorder import RoutingRecorder


class Pending(Protocol):
    """A step that was submitted."""

    def wait(self) -> StepResult:
        """Block until its tokens are there. To be called once."""
        ...


class Executor(Protocol):
    """Runs steps, one after the other. Called from the engine thread, but for `validate`."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def is_warming(self) -> bool:
        """Whether `warm_up` has something to do, now or later."""
        ...

    def validate(self, params: SamplingParams, answers: Sequence[Sequence[int]] = ()) -> None:
        """Check what needs the model to be checked. May be called from any thread.

        Args:
            params: of a request.
            answers: tokens that outputs of it are to go on from.

        Raises:
            RequestError: such a request can never be served.
        """
        ...

    def submit(self, steps: Sequence[StepInput], when_ready: Callable[[], None]) -> Pending:
        """Start a step of each lane, all at once; the host does not wait for the device.

        Tokens that the host does not know are those that the last step submitted chooses. Requests
        with penalties or a grammar need their tokens on the host: wait for one step's before the
        next is submitted.

        Args:
            steps: what to compute, by lane. Results are in this order, too.
            when_ready: called once all that the step copies to the device was submitted, and
                before what it computes is.

        Raises:
            ExpertReadError: an expert that the step needs cannot be read.
            RuntimeError, MemoryError: the step failed. Nothing of it is under way.
        """
        ...

    def copy_blocks(self, copies: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Copy blocks (from, to) of each lane, where no step does and before what comes later."""
        ...

    def release(self, sequence_id: int) -> None:
        """Forget a sequence that has ended. Unknown ids are fine."""
        ...

    def warm_up(self) -> bool:
        """Do the next piece of what makes steps faster, between two steps; whether any was done.

        Raises:
            ModelError: the layers cannot be compiled on this machine.
        """
        ...

    def expert_counts(self) -> ExpertCounts | None:
        """What experts in host memory did so far; waits for the device. None: there are none."""
        ...

    def hot_counts(self) -> HotCounts | None:
        """What hot requests found and fetched; waits for the device. None: none can be hot."""
        ...

    def take_faults(self) -> Counter[str]:
        """What went wrong with experts on disk since the last call, by kind."""
        ...

    def record_routing(self, recorder: "RoutingRecorder | None") -> None:
        """Tell `recorder`, which was there before this, of each step from now on."""
        ...

    def close(self) -> None:
        """Let go of the model. No step may be under way."""
        ...
