"""The tiers below the device, opened and measured."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hotset.clock import Clock
from hotset.cost.rates import Rates
from hotset.engine.sizing import Sizes
from hotset.memory.arena import HostArena
from hotset.memory.copier import make_copier
from hotset.memory.device_payloads import DevicePayloads
from hotset.memory.disk.block_files import Peers
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import DiskTier
from hotset.memory.measure import measure_rates
from hotset.memory.mover import Copier
from hotset.memory.tiers import TierStack
from hotset.metrics import Metrics
from hotset.option_groups import MemoryOptions


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
    host: HostMemory | None,
    rates: Rates,
    metrics: Metrics,
    disk_path: Path,
    fingerprint: dict[str, str],
    undo: ExitStack,
    clock: Clock,
    peers: Peers | None = None,
) -> TierStack | None:
    """Host memory and the slower tiers, as large as `sizes` says; None without host slots.

    `host` is None where host memory is yet to be taken; `peers` have other parts of blocks on disk.
    `undo` closes all.

    Raises:
        TierError: the disk tier cannot be opened.
    """
    if sizes.host_slots == 0:
        return None
    slower = []
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
    measure_rates(tiers, num_blocks=min(16, sizes.device_blocks, tiers.host.num_slots))
    return tiers
