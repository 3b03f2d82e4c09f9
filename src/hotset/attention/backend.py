"""What makes the attention of a step, whichever kernels it runs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch

from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.inputs import Inputs
from hotset.attention.sparse.indexer import Index

# Layer and `[T, H, D]` queries -> `[T, H, D]`, once the layer's keys and values are stored. Sparse
# attention gets the layer's `Index` too.
Run: TypeAlias = Callable[..., torch.Tensor]


class StepAttention(Protocol):
    """Attention of all tokens of one step, layer by layer."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: Index | None = None,
    ) -> torch.Tensor:
        """Store a layer's new keys and values, then attend as the layer's `LayerAttention` says.

        T = tokens of the step, H = heads, D = width of a key, D_v = width of a value.

        Args:
            layer: index of the layer.
            query: `[H, T, D]`.
            key: `[H_kv, T, D]`; of a layer that caches latents the rotary keys, `[1, T, P]`.
            value: `[H_kv, T, D_v]`; of a layer that caches latents these, `[1, T, R]`.
            index: of a layer with sparse attention, its own or that of the layer it shares with.

        Returns:
            `[T, H, D_v]`.
        """
        ...


class AttentionBackend(Protocol):
    """Makes the attention of one step after another."""

    def begin_step(self, batch: Batch, inputs: Inputs) -> StepAttention:
        """The attention of a step; good until the next call."""
        ...


class PlannedStep(Protocol):
    """Kernels that know where a step's sequences are."""

    def run(self, layer: int, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Attend from `query` to `output`, each `[T or more, H, D]`, over a layer's cache.

        The cache has the step's keys and values. Rows beyond the step's T are left out.
        """
        ...


class RecordedDecode(Protocol):
    """Attention of a recorded step of decodes.

    Attributes:
        attention: what the step is recorded with.
    """

    attention: StepAttention

    def plan(self, sequences: Sequence[SequenceSpan]) -> None:
        """Say what the next replay attends to: at most as many sequences as were recorded."""
        ...


class RecordedMixed(Protocol):
    """Attention of all other recorded steps, recorded with them."""

    def begin(self, num_tokens: int) -> None:
        """Plan what a step of `num_tokens` is recorded with; only a recording may run with it."""
        ...

    def holds(self, batch: Batch) -> bool:
        """Whether there is room for a step's sequences, however many tokens it has."""
        ...

    def plan(self, batch: Batch) -> None:
        """Say what the next replay attends to: a step that `holds` allows."""
        ...

    def plan_nothing(self) -> None:
        """Plan a step of no sequence, which recorded steps of any size can run with."""
        ...

    def run(self, *asked: Any, **options: Any) -> torch.Tensor:
        """See `Run`; for as many tokens as `begin` was told."""
        ...


class RecordableBackend(ABC):
    """A backend whose attention CUDA graphs can hold.

    Attributes:
        is_complete: whether all its kernels are in use.
    """

    is_complete: bool

    @abstractmethod
    def begin_step(self, batch: Batch, inputs: Inputs) -> StepAttention:
        """See `AttentionBackend`."""

    @abstractmethod
    def load(self) -> None:
        """Wait for the kernels that any step needs.

        Raises:
            ModelError: they cannot be built.
        """

    @abstractmethod
    def use_all_kernels(self, *, waits: bool) -> bool:
        """Use the kernels that take longer to build, if they are there or `waits`.

        May be called between two steps. Returns whether no kernel is still being built.

        Raises:
            ModelError: one cannot be built, with `waits`.
        """

    @abstractmethod
    def step_with(self, inputs: Inputs, run: Run) -> StepAttention:
        """Attention that stores the step's keys and values, then calls `run`.

        Of the class that all steps have, as compiled code is made for a class.
        """

    @abstractmethod
    def plan(self, batch: Batch) -> PlannedStep:
        """Tell the kernels where a step's sequences are; good until the next plan."""

    @property
    @abstractmethod
    def most_recorded_seqs(self) -> int:
        """The most sequences that a recorded step can have."""

    @property
    @abstractmethod
    def can_record_prompts(self) -> bool:
        """Whether the kernels for prompts can be recorded: their launch must not be the plan's."""

    @abstractmethod
    def record_decode(
        self, inputs: Inputs, *, block_ids: torch.Tensor, scratch_block: int
    ) -> RecordedDecode:
        """Attention of a step of B decodes for a graph.

        Args:
            inputs: the tensors that the graph reads, of B tokens.
            block_ids: int32, for as many blocks as B sequences can have together. Steps that run
                one after another can share it.
            scratch_block: a block that is never read, for the rows beyond the step's sequences.
        """

    @abstractmethod
    def record_mixed(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        block_ids: torch.Tensor,
        scratch_block: int,
    ) -> RecordedMixed:
        """Attention of all other steps for graphs, which share it.

        Args:
            max_num_seqs: most sequences of a step.
            max_num_tokens: most tokens of a step.
            block_ids: int32, for as many blocks as the sequences can have together. What runs
                before or after can share it.
            scratch_block: a block that is never read.
        """
