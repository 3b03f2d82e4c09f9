"""An executor in this process: a model with its sampler, on one device."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from hotset.attention.inputs import to_device
from hotset.attention.sparse.recorder import SelectionRecorder
from hotset.executor.lanes import rows_of_all, sample_all
from hotset.executor.logprobs import PendingPromptLogprobs
from hotset.executor.runner import ModelRunner
from hotset.executor.sampler import PendingTokens, Sampled, Sampler
from hotset.executor.step_input import StepInput, StepResult, Together
from hotset.executor.step_timer import StepTimer
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.recorder import RoutingRecorder
from hotset.metrics import ExpertCounts, HotCounts
from hotset.parallel.tokens import collect_rows
from hotset.request import SamplingParams
from hotset.sequence import Kind


class LocalExecutor:
    """See `Executor`. It computes the first lane; with others, it chooses the tokens of all.

    Args:
        runner: computes logits.
        sampler: chooses tokens from them.
        experts: those in host memory or on disk; None where all stay on the device.
        owns_model: whether the model is used by this alone, so that its experts on disk go with it.
        selections: what is told of each step that has run; None for nothing.

    Attributes:
        chosen: `[R]` tokens that the last step chooses, on the device; None where it chooses none.
    """

    def __init__(
        self,
        runner: ModelRunner,
        sampler: Sampler,
        experts: ExpertBuffer | None = None,
        *,
        owns_model: bool = False,
        selections: SelectionRecorder | None = None,
    ) -> None:
        self.runner, self.sampler = runner, sampler
        self._experts = experts
        self._owns_model, self._selections = owns_model, selections
        self.chosen: torch.Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """See `Executor`."""
        return self.sampler.vocab_size

    @property
    def is_warming(self) -> bool:
        """See `Executor`."""
        return self.runner.is_warming

    def validate(self, params: SamplingParams, answers: Sequence[Sequence[int]] = ()) -> None:
        """See `Executor`."""
        self.sampler.validate(params, answers)

    def submit(
        self, steps: Sequence[StepInput], when_ready: Callable[[], None] = lambda: None
    ) -> "PendingStep":
        """See `Executor`. Drafts are refused, as nothing here compares them with the model."""
        step = steps[0]
        previous, self.chosen = self.chosen, None
        if step.kinds and step.kinds[-1] is Kind.VERIFY:
            raise NotImplementedError(
                "the step has an item of kind VERIFY; this executor runs DECODE and PROMPT"
            )
        timer = StepTimer(self.runner.device)
        logits = self.runner.forward(step, previous, when_ready)  # [R + P, vocab]
        if self._selections is not None:
            ids = [sequence.sequence_id for sequence in step.sample.sequences]
            self._selections.end_step(step.batch, ids)
        sample, of_prompts = step.sample, step.scored
        if step.together is not None:
            logits = _logits_of_all(steps, step.together, logits)
            sample, of_prompts = sample_all(steps)
        num_rows = len(sample.sequences)
        tokens = scored = None
        if num_rows:
            tokens = self.sampler.submit(logits[:num_rows], sample)
            self.chosen = tokens.token_ids
        if of_prompts:
            scored = PendingPromptLogprobs(of_prompts, logits[num_rows:])
        timer.stop()
        return PendingStep(tokens, scored, timer)

    def copy_blocks(self, copies: Sequence[Sequence[tuple[int, int]]]) -> None:
        """See `Executor`."""
        self.runner.copy_blocks(copies[0])

    def release(self, sequence_id: int) -> None:
        """See `Executor`."""
        self.sampler.release(sequence_id)

    def warm_up(self) -> bool:
        """See `Executor`."""
        return warm_up(self.runner, self._experts)

    def expert_counts(self) -> ExpertCounts | None:
        """See `Executor`."""
        return None if self._experts is None else self._experts.counts()

    def hot_counts(self) -> HotCounts | None:
        """See `Executor`."""
        return self.runner.hot_counts()

    def take_faults(self) -> Counter[str]:
        """See `Executor`."""
        return Counter() if self._experts is None else self._experts.take_faults()

    def record_routing(self, recorder: RoutingRecorder | None) -> None:
        """See `Executor`."""
        self.runner.recorder = recorder

    def close(self) -> None:
        """See `Executor`."""
        self.runner.close()
        if self._experts is not None:
            self._experts.close(with_disk=self._owns_model)


@torch.inference_mode()
def _logits_of_all(
    steps: Sequence[StepInput], together: Together, logits: torch.Tensor
) -> torch.Tensor:
    """`[R + P, vocab]` of all lanes, of which each rank brings its own."""
    if not together.num_rows:
        return logits
    collected = collect_rows(logits, together.num_rows)
    assert collected is not None, "tokens are chosen on rank 0"
    return collected.flatten(0, 1)[to_device(rows_of_all(steps), logits.device)]


def warm_up(runner: ModelRunner, experts: ExpertBuffer | None) -> bool:
    """Do the next piece of what makes steps faster; see `ModelRunner.warm_up`."""
    with nullcontext() if experts is None else experts.while_recording():
        return runner.warm_up()


class PendingStep:
    """A step that the device was given; see `Pending`.

    Args:
        tokens: None where the step chooses none.
        scored: None where it brings no log-probabilities of prompts.
        timer: stopped when all was submitted.
    """

    def __init__(
        self,
        tokens: PendingTokens | None,
        scored: PendingPromptLogprobs | None,
        timer: StepTimer,
    ) -> None:
        self._tokens, self._scored, self._timer = tokens, scored, timer

    def wait(self) -> StepResult:
        """See `Pending`."""
        prompt_logprobs = [] if self._scored is None else self._scored.wait()
        sampled = Sampled([], []) if self._tokens is None else self._tokens.wait()
        return StepResult(
            sampled.token_ids,
            sampled.logprobs,
            sampled.errors,
            prompt_logprobs,
            self._timer.seconds(),
            sampled.not_finite,
        )
