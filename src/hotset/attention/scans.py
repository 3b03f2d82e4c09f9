"""What links the tokens of a layer that keeps a state: a convolution, and a recurrence.

A recurrence runs in chunks of a text, or over one token of many sequences.

Values come first in a state (`[H, V, K]`), as kernels have it. One step after another is what the
chunk form is equal to but for rounding.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from hotset.attention.state_tables import GRID
from hotset.kernels.state_inputs import DeltaTokens, Mamba1Tokens, Mamba2Tokens


class Convolution(NamedTuple):
    """A causal convolution of each channel of one layer over the T tokens of a step.

    Attributes:
        values: `[C, T]`, any strides.
        weight: `[C, kernel]`, contiguous.
        bias: `[C]`; None for none.
        activation: of the result, by transformers' name; None for none.
    """

    values: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str | None


class Scan(ABC):
    """The recurrence of one layer over the T tokens of a step."""

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, values, keys."""

    @property
    @abstractmethod
    def rows(self) -> tuple[torch.Tensor, ...]:
        """What it is given of each token, `[T, ...]` each."""

    @abstractmethod
    def new_output(self) -> torch.Tensor:
        """`[T, heads, values]`, yet to be written."""

    @abstractmethod
    def decode(self, num: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `num` tokens, each of another sequence.

        Args:
            num: R.
            state: `[R, H, V, K]` float32, before the tokens.

        Returns:
            `[R, H, V]` output, and the state after the tokens.
        """

    @abstractmethod
    def chunk(self, start: int, end: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[start, end)` of one sequence, at most up to the next multiple of `GRID`.

        Args:
            start: a row of the step.
            end: the row after the last.
            state: `[H, V, K]` float32, before the tokens.

        Returns:
            `[end - start, H, V]` output, and the state after the tokens.
        """


@dataclass(frozen=True, slots=True)
class GatedDelta(DeltaTokens, Scan):
    """Gated delta rule (Yang et al., "Gated Delta Networks", 2024, equation 10).

    With a decay of its own for each key that is Kimi Delta Attention (arXiv 2510.26692).

    Attributes:
        original: the chunk form of transformers.
    """

    original: Callable[..., Any]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """See `Scan`."""
        return (*self.value.shape[1:], self.key.shape[-1])

    @property
    def rows(self) -> tuple[torch.Tensor, ...]:
        """See `Scan`."""
        return (self.query, self.key, self.value, self.decay, self.beta)

    def new_output(self) -> torch.Tensor:
        """See `Scan`."""
        return self.value.new_empty(self.value.shape, dtype=self.query.dtype)

    def decode(self, num: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Scan`."""
        query, key, value, decay, beta = (rows[:num].float() for rows in self.rows)
        if self.normalises:
            query, key = _of_length_1(query), _of_length_1(key)
        repeats = value.shape[1] // key.shape[1]
        query = query.repeat_interleave(repeats, dim=1) * query.shape[-1] ** -0.5
        key = key.repeat_interleave(repeats, dim=1)
        decay = decay if decay.ndim == 3 else decay.unsqueeze(-1)  # of keys, or of a head
        state = state * decay.exp().unsqueeze(-2)
        known = (state * key.unsqueeze(-2)).sum(-1)
        change = (value - known) * beta.unsqueeze(-1)
        state = state + change.unsqueeze(-1) * key.unsqueeze(-2)
        output = (state * query.unsqueeze(-2)).sum(-1)
        return output.to(self.query.dtype), state

    def chunk(self, start: int, end: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Scan`."""
        query, key, value, decay, beta = (rows[start:end].unsqueeze(0) for rows in self.rows)
        output, after = self.original(
            query,
            key,
            value,
            g=decay,
            beta=beta,
            chunk_size=GRID,
            initial_state=state.transpose(-1, -2).unsqueeze(0),
            output_final_state=True,
            use_qk_l2norm_in_kernel=self.normalises,
        )
        return output[0], after[0].transpose(-1, -2)


@dataclass(frozen=True, slots=True)
class Mamba2(Mamba2Tokens, Scan):
    """State space duality (Dao and Gu, "Transformers are SSMs", 2024, section 6).

    Attributes:
        original: the chunk form of transformers.
    """

    original: Callable[..., Any]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """See `Scan`."""
        return (*self.value.shape[1:], self.key.shape[-1])

    @property
    def rows(self) -> tuple[torch.Tensor, ...]:
        """See `Scan`."""
        return (self.value, self.step, self.key, self.query)

    def new_output(self) -> torch.Tensor:
        """See `Scan`."""
        return self.value.new_empty(self.value.shape, dtype=torch.float32)

    def decode(self, num: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Scan`."""
        value, key, query = (rows[:num].float() for rows in (self.value, self.key, self.query))
        repeats = value.shape[1] // key.shape[1]
        key, query = (rows.repeat_interleave(repeats, dim=1) for rows in (key, query))
        step = self.step[:num]
        if self.bias is not None:
            step = step + self.bias.to(step.dtype)
        if self.is_softplus:
            step = functional.softplus(step)
        step = step.clamp(*self.bounds).float()
        decay = (step * self.rate.float()).exp()
        change = (value * step.unsqueeze(-1)).unsqueeze(-1) * key.unsqueeze(-2)
        state = state * decay[..., None, None] + change
        output = (state * query.unsqueeze(-2)).sum(-1)
        if self.skip is not None:
            output = output + self.skip.unsqueeze(-1) * value
        return output, state

    def chunk(self, start: int, end: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Scan`."""
        value, step, key, query = (rows[start:end].unsqueeze(0) for rows in self.rows)
        output, after = self.original(
            value,
            step,
            self.rate,
            key,
            query,
            chunk_size=GRID,
            D=self.skip,
            dt_bias=self.bias,
            initial_states=state.unsqueeze(0),
            dt_softplus=self.is_softplus,
            dt_limit=self.bounds,
            return_final_states=True,
        )
        return output[0], after[0]


@dataclass(frozen=True, slots=True)
class Mamba1(Mamba1Tokens, Scan):
    """Selective scan (Gu and Dao, "Mamba", 2023, section 3.2), token by token in float32.

    A state is one head's, and so are the output's values.
    """

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """See `Scan`."""
        return (1, *self.rate.shape)

    @property
    def rows(self) -> tuple[torch.Tensor, ...]:
        """See `Scan`."""
        rows = (self.value, self.step, self.key, self.query)
        return rows if self.gate is None else (*rows, self.gate)

    def new_output(self) -> torch.Tensor:
        """See `Scan`."""
        return self.value.new_empty((len(self.value), 1, len(self.rate)), dtype=torch.float32)

    def decode(self, num: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Scan`."""
        decay, change = self._of_tokens(slice(num))
        state = state * decay + change
        return self._output(slice(num), state), state

    def chunk(self, start: int, end: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Scan`."""
        states = []
        for decay, change in zip(*self._of_tokens(slice(start, end)), strict=True):
            state = state * decay + change
            states.append(state)
        return self._output(slice(start, end), torch.stack(states)), state

    def _of_tokens(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """`[R, 1, V, K]` each: what the state is multiplied with, and what is added to it."""
        step = self.step[rows].float()
        if self.bias is not None:
            step = step + self.bias.float()
        if self.is_softplus:
            step = functional.softplus(step)
        decay = (step.unsqueeze(-1) * self.rate.float()).exp()
        change = (step * self.value[rows].float()).unsqueeze(-1) * self.key[rows, None].float()
        return decay.unsqueeze(1), change.unsqueeze(1)

    def _output(self, rows: slice, states: torch.Tensor) -> torch.Tensor:
        """`[R, 1, V]` of the `[R, 1, V, K]` states after the tokens."""
        output = (states * self.query[rows, None, None].float()).sum(-1)
        if self.skip is not None:
            output = output + (self.skip.float() * self.value[rows].float()).unsqueeze(1)
        if self.gate is not None:
            output = output * functional.silu(self.gate[rows].float()).unsqueeze(1)
        return output


def _of_length_1(rows: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + 1e-6)
