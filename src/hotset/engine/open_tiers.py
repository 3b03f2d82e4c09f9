"""The tiers below the device, opened and measured."""

import logging
import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hotset.clock import Clock
from hotset.cost.rates import Rates
from hotset.engine.sizing import Sizes
from hotset.errors import ConfigError
from hotset.memory.arena import HostArena
from hotset.memory.copier import make_copier
from hotset.memory.device_payloads import DevicePayloads
from hotset.memory.disk.block_files import Peers
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import DiskTier
from hotset.memory.measure import measure_rates
from hotset.memory.mover import Copier
from hotset.memory.tier import Tier
from hotset.memory.tiers import TierStack
from hotset.metrics import Metrics
from hotset.option_groups import MemoryOptions
from hotset.ranks.copier import FarHost
from hotset.secret import read_secret

_WRITING_PART = 8  # of host memory is at most what is on its way to stores
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Host memory for KV, and what copies to it and from it.

    On a GPU it is being pinned in the background, its first slots are already.
    """

    arena: HostArena
    copier: Copier

    @classmethod
    def take(cls, sizes: Sizes, device: DevicePayloads) -> "HostMemory":
        """As large as `sizes` says."""
        arena = HostArena(num_slots=sizes.host_slots, block_bytes=sizes.block_bytes)
        return cls(arena, make_copier(device.memories, arena))


def open_tiers(
    memory: MemoryOptions,
    sizes: Sizes,
    device: DevicePayloads,
    host: HostMemory | FarHost | None,
    rates: Rates,
    metrics: Metrics,
    disk_path: Path,
    fingerprint: dict[str, str],
    numerics: str,
    undo: ExitStack,
    clock: Clock,
    peers: Peers | None = None,
) -> TierStack | None:
    """Host memory and the slower tiers, as large as `sizes` says; None without host slots.

    `host` is None where host memory is yet to be taken; `peers` have other parts of blocks on disk.
    Blocks depend on `fingerprint`, and their last bits on `numerics`. `undo` closes all.

    Raises:
        ConfigError: the address of a store, or the file of its secret, cannot be used;
            `TierError`: the disk tier or a store cannot.
    """
    if sizes.host_slots == 0:
        return None
    slower: list[Tier] = []
    if sizes.disk_bytes:
        disk = DiskTier(
            disk_path,
            payload_bytes=slot_bytes_for(sizes.block_bytes),
            capacity_bytes=sizes.disk_bytes,
            fingerprint=fingerprint,
            read_deadline_s=memory.disk_read_deadline_s,
            write_queue_s=memory.disk_write_queue_s,
            clock=clock,
            peers=peers,
        )
        slower.append(disk)
    shared = None
    if memory.remote or memory.peer_url:
        on = {} if memory.remote_share == "any" else {"on": numerics}
        shared = _Shared(memory, sizes, repr({**fingerprint, **on}), undo, clock)
        slower += shared.tiers
    host = host or HostMemory.take(sizes, device)
    tiers = TierStack(
        device,
        host.arena,
        host.copier,
        num_slots=sizes.host_slots,
        rates=rates,
        metrics=metrics,
        slower=slower,
        clock=clock,
    )
    undo.callback(tiers.close)
    if shared is not None:
        shared.serve(tiers)
    measure_rates(tiers, num_blocks=min(16, sizes.device_blocks, tiers.host.num_slots))
    return tiers


class _Shared:
    """Tiers that other replicas share: host memory of peers, then stores.

    Raises ConfigError or TierError where they cannot work as they are asked for.
    """

    def __init__(
        self,
        memory: MemoryOptions,
        sizes: Sizes,
        fingerprint: str,
        undo: ExitStack,
        clock: Clock,
    ) -> None:
        try:
            from hotset.memory.remote.peers import PeerTier
            from hotset.memory.remote.resp import Address
            from hotset.memory.remote.seal import Seal
            from hotset.memory.remote.tier import RemoteTier
        except ImportError as error:
            raise ConfigError(
                f"blocks cannot be shared without a package that is missing ({error}); run: "
                "pip install 'hotset[fleet]'"
            ) from error
        assert memory.remote_secret_file is not None
        self._seal = Seal(
            read_secret(memory.remote_secret_file),
            fingerprint,
            memory.remote_writer or f"{socket.gethostname()}-{os.getpid()}",
            encrypts=memory.remote_encrypt,
        )
        self._payload_bytes = slot_bytes_for(sizes.block_bytes)
        self._url, self._peers = memory.peer_url, None
        self.tiers: list[Tier] = []
        if memory.peer_url is not None:
            if sizes.states is not None:
                raise ConfigError(
                    f"peer_url is {memory.peer_url}, and of a model whose layers keep a state "
                    "peers have the KV alone; leave it out, and give remote"
                )
            self._peers = PeerTier(self._seal, payload_bytes=self._payload_bytes, clock=clock)
            undo.callback(self._peers.close)
            self.tiers.append(self._peers)
        if memory.remote:
            stores = RemoteTier(
                [Address.of(url) for url in memory.remote],
                self._seal,
                payload_bytes=self._payload_bytes,
                most_writes=sizes.host_slots // _WRITING_PART,
                clock=clock,
            )
            undo.callback(stores.close)
            self.tiers.append(stores)
            for note in stores.notes:
                _log.warning(note)

    def serve(self, tiers: TierStack) -> None:
        """Have peers find what host memory has, and requests name peers."""
        if self._peers is None or self._url is None:
            return
        from hotset.memory.remote.peer_server import PeerServer

        self._peers.server = PeerServer(
            self._url,
            self._seal,
            payload_bytes=self._payload_bytes,
            has=tiers.host.has,
            copy_out=tiers.copy_out,
            is_busy=lambda: tiers.queued_fetch_bytes() > 0,
        )
        tiers.expect = self._peers.expect
