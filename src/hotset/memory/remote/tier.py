"""The remote tier: payloads in stores that several machines share. Imports no torch."""

import hashlib
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from hotset.clock import REAL_CLOCK, Clock
from hotset.memory.remote.admission import Admission
from hotset.memory.remote.resp import Address
from hotset.memory.remote.seal import Seal
from hotset.memory.remote.shared import SharedTier
from hotset.memory.remote.store import Store, Transfer
from hotset.memory.tier import PATIENCE, TierInfo, TierUsage

_MOST_WRITES = 64
_WRITE_WAIT_S = 2.0  # the longest that a write waits for its turn


class RemoteTier(SharedTier):
    """A `Tier` in one or more stores. Each key has its place in one of them.

    What is new is written as far as `Admission` says; what `touch` returned is written in any case.

    Faults counted in `usage()`, by kind, each after `remote_`: `missing` (it was there when it was
    asked for), `forged`, `foreign`, `revoked` and `stale` (see `Seal.open`), `late`, `down`,
    `write_dropped`, `full`, `refused`; and after `remote_connection_` those of connections: `down`,
    `late`, `login`, `unbounded`, `protocol`, `foreign`, `foul` (nothing of a batch could be used).

    Args:
        addresses: of the stores.
        seal: of the payloads.
        payload_bytes: of one.
        most_writes: payloads that may be on their way to stores, each in the caller's memory.
        clock: of the credit for writes, and of how long an answer counts.

    Attributes:
        notes: what to say of the stores at start.

    Raises:
        TierError: a store refuses the login, or its memory has no bound.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        seal: Seal,
        *,
        payload_bytes: int,
        most_writes: int = _MOST_WRITES,
        clock: Clock = REAL_CLOCK,
    ) -> None:
        super().__init__("remote", payload_bytes, clock)
        self._most_writes = max(1, min(most_writes, _MOST_WRITES))
        self._by_name = {
            one.name: Store(one, seal, payload_bytes, self._mailbox) for one in addresses
        }
        self.notes: list[str] = []
        with ExitStack() as undo:
            for name, store in self._by_name.items():
                why = store.open()
                undo.callback(store.close)
                if why is not None:
                    self.notes.append(f"the store {name} is of no use yet: {why}")
            undo.pop_all()
        stores = self._by_name.values()
        write_bytes_per_s = sum(store.write_bytes_per_s for store in stores)
        self._admission = Admission(payload_bytes, write_bytes_per_s, clock)
        self.info = TierInfo(
            "remote",
            sum(store.most_bytes // store.value_bytes for store in stores),
            payload_bytes,
            measured_bytes_per_s=sum(store.measured_bytes_per_s for store in stores),
            patience=PATIENCE,
        )

    def _stores(self) -> Iterable[Store]:
        return self._by_name.values()

    def _store_of(self, key: bytes) -> Store:
        """See `SharedTier`: the same for all that have the same stores, whatever their order.

        Source: rendezvous hashing, Thaler and Ravishankar, "Using name-based mappings to increase
        hit rates", IEEE/ACM Transactions on Networking 1998.
        """
        if len(self._by_name) == 1:
            return next(iter(self._by_name.values()))

        def weight(name: str) -> bytes:
            return hashlib.blake2b(key + name.encode(), digest_size=8).digest()

        return self._by_name[max(self._by_name, key=weight)]

    def submit_write(self, key: bytes, payload: memoryview, *, must: bool = False) -> int | None:
        """See `Tier`."""
        store = self._store_of(key)
        if self._has(key) or store.breaker.is_open:
            return None
        if len(self._writes) >= self._most_writes:
            self._faults["write_dropped"] += 1
            return None
        if not must and not self._admission.takes_new(key):
            return None
        until_s = time.monotonic() + _WRITE_WAIT_S
        transfer = Transfer(next(self._ids), key, payload.cast("B"), until_s)
        self._writes[transfer.transfer_id] = transfer
        store.write(transfer)
        return transfer.transfer_id

    def touch(self, keys: Sequence[bytes], *, came_back: bool = False) -> Sequence[bytes]:
        """See `Tier`. Stores note themselves what they read."""
        lacking = [key for key in reversed(keys) if not self._has(key)]
        if not lacking:
            return ()
        return self._admission.takes_used(keys, lacking, came_back=came_back)

    def discard(self, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        writing = {transfer.key: transfer for transfer in self._writes.values()}
        for key in keys:
            if key in writing:
                writing[key].is_wanted = False
            if key in writing or self._has(key):
                self._store_of(key).forget(key)
                self._note(key, False)

    def usage(self) -> TierUsage:
        """See `Tier`."""
        stores = self._by_name.values()
        counts = {
            "first_read": sum(store.first_read_bytes for store in stores),
            "declined": self._admission.declined_bytes,
        }
        rate = sum(store.measured_bytes_per_s for store in stores)
        return replace(super().usage(), byte_counts=counts, measured_bytes_per_s=rate)

    def _has(self, key: bytes) -> bool:
        known = self._known.get(key)
        return known is not None and known[0]

    def _ended(self, transfer: Transfer, *, is_read: bool) -> None:
        if is_read and transfer.fault is None:
            self._admission.credit.was_read(self._payload_bytes)
