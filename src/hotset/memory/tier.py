"""What is known of any tier, and the protocol of one below host memory. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from hotset.memory.journal import OnChange

PATIENCE = 0.02  # with a tier that may well not have what it is asked for


@dataclass(frozen=True, slots=True)
class TierInfo:
    """What views, rates and metrics need to know of a tier: a row of data.

    Attributes:
        name: as metrics, rates and views call it.
        capacity_payloads: how many payloads it is to hold.
        payload_bytes: that one of them takes.
        feeds_device: whether copies to the device start here; from others a payload comes here
            first.
        measured_bytes_per_s: how fast payloads are read, where the tier has measured that itself.
        patience: how long it may think about what it has, as a part of the time that it takes to
            do without: as likely as it is to have it, about. None: it says at once what it has.
    """

    name: str
    capacity_payloads: int
    payload_bytes: int
    feeds_device: bool = False
    measured_bytes_per_s: float | None = None
    patience: float | None = None

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all payloads that it is to hold."""
        return self.capacity_payloads * self.payload_bytes


class Answer(Enum):
    """What a tier says of a key."""

    HIT = "hit"  # the payload can be read now
    MISS = "miss"
    PENDING = "pending"  # cannot say yet: ask again


@dataclass(frozen=True, slots=True)
class Found:
    """What the tiers together say of a key; a HIT names the fastest tier that has it."""

    answer: Answer
    tier: TierInfo | None = None


class CompletionStatus(Enum):
    """How a submitted read or write ended, or that its deadline has passed."""

    OK = "ok"
    FAILED = "failed"  # not written, or not read: missing, unreadable or its checksum is wrong
    LATE = "late"  # past its deadline and still using the buffer; OK or FAILED follows


@dataclass(frozen=True, slots=True)
class Completion:
    """One report of `Tier.poll`.

    Attributes:
        fault: what went wrong, where the tier tells.
    """

    transfer_id: int
    key: bytes
    status: CompletionStatus
    fault: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What a tier holds, and what went wrong in it since it was opened.

    Attributes:
        capacity_payloads: how many it can hold now.
        states: one letter for each place, where it knows them: see `Residency.states`.
        byte_counts: bytes since it was opened, by what became of them; see `Metrics.tier_bytes`.
        measured_bytes_per_s: how fast payloads are read, where the tier measures that itself.
    """

    used_payloads: int
    capacity_payloads: int
    faults: dict[str, int]
    states: str | None = None
    byte_counts: dict[str, int] = field(default_factory=dict)
    measured_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class EndedTransfer:
    """A copy between the device and host memory that has ended, well or not."""

    key: bytes
    block: int
    is_fetch: bool
    ok: bool


class Tier(Protocol):
    """One level of memory below host memory, holding fixed-size payloads by key.

    Every method is called from the engine thread and returns at once: `submit_write` and
    `submit_read` start a copy, `poll` reports the ended ones. A buffer given to a submit must
    stay unchanged (write) or untouched (read) until `poll` reports OK or FAILED for its id.
    A fault is a FAILED completion and a counter, never an exception.

    Attributes:
        on_change: see `journal.Source`.
    """

    info: TierInfo
    on_change: OnChange | None

    def lookup(self, keys: Sequence[bytes], *, may_ask: bool = True) -> list[Answer]:
        """For each key, whether its payload is stored and readable now (a queued write is not).

        A tier that asks another machine starts to, and answers PENDING until it knows; where it
        may not ask, what it does not know is a MISS.
        """
        ...

    def submit_write(self, key: bytes, payload: memoryview, *, must: bool = False) -> int | None:
        """Start storing `payload`; returns a transfer id, or None where the write was dropped.

        A write is dropped (and counted) when the queue is full or the tier is unusable, and, unless
        it `must` be, where the payload is not worth it.
        The oldest payloads are evicted as needed; the size bound is never passed.
        """
        ...

    def submit_read(self, key: bytes, into: memoryview) -> int:
        """Start reading the payload of `key` into `into`; returns a transfer id."""
        ...

    def touch(self, keys: Sequence[bytes], *, came_back: bool = False) -> Sequence[bytes]:
        """Mark `keys` as just used, so that they are evicted last.

        They are of one conversation, its last one first; `came_back`: a later request found them.
        Returns those that it declined when they were new and takes now: see `submit_write`, `must`.
        """
        ...

    def newest_keys(self, limit: int) -> list[bytes]:
        """At most `limit` keys of stored payloads, the last used first."""
        ...

    def discard(self, keys: Sequence[bytes]) -> None:
        """Forget the payloads of `keys`, also of those whose write has not ended.

        A read under way goes on, and ends as it would have.
        """
        ...

    def poll(self) -> list[Completion]:
        """Report what ended since the last call. Never blocks."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Block until something can be polled, or `timeout_s` has passed."""
        ...

    def usage(self) -> TierUsage:
        """Counts for the metrics."""
        ...

    def close(self) -> None:
        """Finish or drop what is queued within a bounded time and release the resources."""
        ...
