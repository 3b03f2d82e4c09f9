"""The tiers below the device, opened and measured."""

from contextlib import ExitStack
from pathlib import Path

from hotset.config import EngineConfig
from hotset.cost.rates import Rates
from hotset.engine.budget import Budget
from hotset.memory.arena import DeviceArena, HostArena
from hotset.memory.copier import make_copier
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import DiskTier
from hotset.memory.measure import measure_rates
from hotset.memory.tiers import TierStack
from hotset.metrics import Metrics


def open_tiers(
    config: EngineConfig,
    budget: Budget,
    arena: DeviceArena,
    rates: Rates,
    metrics: Metrics,
    disk_path: Path,
    fingerprint: dict[str, str],
    undo: ExitStack,
) -> TierStack | None:
    """Host memory and the slower tiers, as large as `budget` says; None without host slots.

    `undo` closes them.

    Raises:
        TierError: the disk tier cannot be opened.
    """
    if budget.host_slots == 0:
        return None
    slower = []
    if budget.disk_bytes:
        disk = DiskTier.open(
            disk_path,
            payload_bytes=slot_bytes_for(budget.block_bytes),
            capacity_bytes=budget.disk_bytes,
            fingerprint=fingerprint,
            read_deadline_s=config.disk_read_deadline_s,
            write_queue_s=config.disk_write_queue_s,
        )
        slower.append(disk)
    memory = HostArena(num_slots=budget.host_slots, block_bytes=budget.block_bytes)
    tiers = TierStack(
        arena,
        memory,
        make_copier(arena, memory),
        num_slots=budget.host_slots,
        rates=rates,
        metrics=metrics,
        slower=slower,
    )
    undo.callback(tiers.close)
    measure_rates(tiers, num_blocks=min(16, budget.device_blocks, tiers.host.num_slots))
    return tiers
