"""The sizes that steps are recorded in, and which of them runs a step. Imports no torch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

# While sizes are missing, a step runs in one of at most as many times its rows: it takes less
# time than to launch its kernels one by one.
_MOST_PADDING = 4


def sizes_up_to(sizes: tuple[int, ...], largest: int) -> list[int]:
    """Those of `sizes` below `largest`, and `largest` unless it is beyond them all."""
    return [size for size in sizes if size < largest] + [largest] * (largest <= sizes[-1])


def fastest(sizes: Sequence[int], seconds: Sequence[float]) -> list[int]:
    """For 0, 1, ... up to the largest size: the index of the fastest size that is not smaller.

    A product of more rows can be the faster one, as libraries choose another kernel for it: with
    bfloat16 weights of 4096 x 28672 on an H200, 448 rows take 269 us and 512 rows 159.
    """
    chosen: list[int] = []
    best = len(sizes) - 1
    for index in range(len(sizes) - 1, -1, -1):
        if seconds[index] <= seconds[best]:
            best = index
        smaller = sizes[index - 1] + 1 if index else 0
        chosen += [best] * (sizes[index] + 1 - smaller)
    return chosen[::-1]


class RecordedSizes:
    """Sizes of one kind of step, recorded one after another.

    Args:
        sizes: ascending.

    Attributes:
        missing: those still to be recorded, in the order in which they should be: the largest
            first, as the others reuse its memory; then the smallest, which is compiled apart.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = list(sizes)
        *others, largest = self._sizes
        self.missing = [largest, *others[:1], *others[:0:-1]]
        self._seconds: dict[int, float] = {}
        self._fastest: list[int] = []

    def add(self, size: int, seconds: float) -> None:
        """The next of `missing` was recorded, and takes `seconds`."""
        self.missing.remove(size)
        self._seconds[size] = seconds
        if not self.missing:
            self._fastest = fastest(self._sizes, [self._seconds[size] for size in self._sizes])

    def find(self, num_rows: int) -> int | None:
        """The size to run a step of `num_rows` rows in; None where none is recorded for it."""
        if self._fastest:
            return self._sizes[self._fastest[num_rows]] if num_rows <= self._sizes[-1] else None
        held = [size for size in self._seconds if num_rows <= size <= _MOST_PADDING * num_rows]
        return min(held, default=None)


class RecordedStep(NamedTuple):
    """One recorded step: of `size` decodes, or of `size` tokens of any sequences."""

    is_decode: bool
    size: int


class RecordedSteps:
    """Which steps are recorded, and which of them runs a step.

    Args:
        decode_sizes: ascending, in sequences of one token that all sample.
        mixed_sizes: ascending, in tokens.
        most_seqs: the most sequences that a step of decodes can have.
        most_tokens: the most tokens that a step can have.

    Attributes:
        largest_mixed: tokens of the largest mixed step.
    """

    def __init__(
        self,
        decode_sizes: tuple[int, ...],
        mixed_sizes: tuple[int, ...],
        *,
        most_seqs: int,
        most_tokens: int,
    ) -> None:
        mixed = sizes_up_to(mixed_sizes, most_tokens)
        self._decodes = RecordedSizes(sizes_up_to(decode_sizes, min(most_seqs, most_tokens)))
        self._mixed = RecordedSizes(mixed)
        self.largest_mixed = mixed[-1]

    @property
    def next_missing(self) -> RecordedStep | None:
        """The step to record next, decodes first; None once all are recorded."""
        for is_decode, sizes in ((True, self._decodes), (False, self._mixed)):
            if sizes.missing:
                return RecordedStep(is_decode, sizes.missing[0])
        return None

    def add(self, step: RecordedStep, seconds: float) -> None:
        """`next_missing` was recorded, and takes `seconds`."""
        (self._decodes if step.is_decode else self._mixed).add(step.size, seconds)

    def find(
        self, num_tokens: int, *, is_decode: bool, is_held: Callable[[], bool]
    ) -> RecordedStep | None:
        """The recorded step that runs one of `num_tokens` tokens; None: it has to be launched.

        Args:
            num_tokens: of the step.
            is_decode: whether it is one token of each sequence, and all sample.
            is_held: whether the attention of mixed steps has room for all sequences.
        """
        if is_decode and (size := self._decodes.find(num_tokens)) is not None:
            return RecordedStep(True, size)
        if (size := self._mixed.find(num_tokens)) is not None and is_held():
            return RecordedStep(False, size)
        return None
