"""What is below the device, as the KV cache sees it: one thing, whose copies end some time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class EndedTransfer:
    """A copy between the device and a colder tier that has ended, well or not."""

    key: bytes
    block: int
    is_fetch: bool
    ok: bool


class ColderTiers(Protocol):
    """The tiers below the device, as one. Called from the engine thread; nothing blocks."""

    def locate(self, key: bytes) -> str | None:
        """Name of the fastest tier that has the payload of `key`, or will shortly."""
        ...

    def spill(self, key: bytes, block: int, *, private: bool = False) -> bool:
        """Start copying `block` down; False where there is no room. Its content must stay still.

        A private payload stays in host memory: only its request can ask for it.
        """
        ...

    def fetch(self, key: bytes, block: int) -> None:
        """Start copying the payload of `key` into `block`, which must stay untouched meanwhile."""
        ...

    def drop(self, key: bytes) -> None:
        """Forget a private payload."""
        ...

    def keep(self, key: bytes) -> bool:
        """Hold a payload in host memory until `unkeep`; False where it is not there.

        Or where too few slots would be left for others.
        """
        ...

    def unkeep(self, key: bytes) -> None:
        """Undo one `keep`."""
        ...

    def num_evictable(self) -> int:
        """Payloads that host memory can take beside what is kept and what is being moved."""
        ...

    def touch(self, keys: Sequence[bytes]) -> None:
        """Mark payloads as just used, so that they are evicted last."""
        ...

    def stage(self, key: bytes) -> bool:
        """Start bringing a payload from disk into host memory, ahead of a fetch."""
        ...

    def most_staged(self) -> int:
        """Payloads that may be brought ahead of a fetch, so that none pushes others out."""
        ...

    def queued_fetch_bytes(self) -> int:
        """Bytes asked for by `fetch` that have not arrived."""
        ...

    def poll(self) -> list[EndedTransfer]:
        """What ended since the last call."""
        ...
