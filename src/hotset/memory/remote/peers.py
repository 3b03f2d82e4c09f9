"""The peer tier: payloads in host memory of other replicas, where a router says so.

Imports no torch.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hotset.clock import REAL_CLOCK, Clock
from hotset.errors import ConfigError
from hotset.memory.remote.peer_server import PeerServer
from hotset.memory.remote.resp import Address
from hotset.memory.remote.seal import Seal
from hotset.memory.remote.shared import SharedTier
from hotset.memory.remote.store import Store, Transfer
from hotset.memory.tier import TierInfo

_ASSUMED_RATE = 1e9  # bytes/s before anything was read: nearly a 10 Gbit/s link
_MOST_PEERS = 64
_MOST_EXPECTED = 1 << 17


class PeerTier(SharedTier):
    """A `Tier` that reads what other replicas have in host memory, and writes nothing.

    A peer is asked for keys that it is said to have alone. Faults are as `RemoteTier`'s, each after
    `peer_`.

    Args:
        seal: by which peers seal what they send; its password is theirs.
        payload_bytes: of one payload.
        clock: of how long an answer counts.

    Attributes:
        server: answers the peers in turn; closed with this.
    """

    _there_s = 5.0  # its host memory goes on to be used

    def __init__(self, seal: Seal, *, payload_bytes: int, clock: Clock = REAL_CLOCK) -> None:
        super().__init__("peer", payload_bytes, clock)
        self._seal = seal
        self.server: PeerServer | None = None
        self._by_url: dict[str, Store] = {}
        self._expected: OrderedDict[bytes, Store] = OrderedDict()
        self.info = TierInfo(
            "peer",
            0,
            payload_bytes,
            measured_bytes_per_s=_ASSUMED_RATE,
            patience=1.0,  # asked for what it is said to have
        )

    def expect(self, keys: Sequence[bytes], url: str) -> None:
        """A peer is said to have the payloads of `keys`. A URL that is none is left alone."""
        store = self._by_url.get(url) or self._open(url)
        if store is None:
            self._faults["unknown"] += 1
            return
        for key in keys:
            self._expected[key] = store
            self._expected.move_to_end(key)
        while len(self._expected) > _MOST_EXPECTED:
            self._expected.popitem(last=False)

    def _open(self, url: str) -> Store | None:
        """Connect, in threads; None where there are too many peers, or the URL is none."""
        if len(self._by_url) == _MOST_PEERS:
            return None
        try:
            address = replace(Address.of(url), password=self._seal.password())
        except ConfigError:
            return None
        store = Store(address, self._seal, self._payload_bytes, self._mailbox, is_peer=True)
        store.open()
        self._by_url[url] = store
        return store

    def _stores(self) -> Iterable[Store]:
        return self._by_url.values()

    def _store_of(self, key: bytes) -> Store | None:
        return self._expected.get(key)

    def _note(self, key: bytes, is_there: bool) -> None:
        super()._note(key, is_there)
        if not is_there:
            self._expected.pop(key, None)

    def submit_write(self, key: bytes, payload: memoryview, *, must: bool = False) -> int | None:
        """See `Tier`: it takes none."""
        return None

    def touch(self, keys: Sequence[bytes], *, came_back: bool = False) -> Sequence[bytes]:
        """See `Tier`. Peers are not told."""
        return ()

    def discard(self, keys: Sequence[bytes]) -> None:
        """See `Tier`: they are not asked for again."""
        for key in keys:
            if key in self._expected:
                self._note(key, False)

    def close(self) -> None:
        """See `Tier`."""
        if self.server is not None:
            self.server.close()
        super().close()

    def _ended(self, transfer: Transfer, *, is_read: bool) -> None:
        """See `SharedTier`."""
