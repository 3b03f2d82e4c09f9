"""Rates of the tiers, measured before any use. Imports no torch."""

import secrets
import time

from hotset.memory.residency import State
from hotset.memory.slower_tier import SlowerTier
from hotset.memory.tiers import TierStack

_PROBE_S = 2.0
_ASSUMED_RATE = 100_000_000  # bytes/s of a tier of which nothing could be read


def measure_rates(tiers: TierStack, *, num_blocks: int) -> None:
    """Copy `num_blocks` blocks each way, read as many payloads of each slower tier, note the rates.

    Before any use. The content of the device blocks stays as it was, and so does what is stored in
    slower tiers: payloads are written there only into free room, and forgotten afterwards. Takes a
    few seconds per tier at most, however slow it is.
    """
    tiers.mark()
    tiers.mover.time_copies(num_blocks, to_host=True)
    seconds = tiers.mover.time_copies(num_blocks, to_host=False)
    tiers.rates.observe_link(tiers.infos[0].name, num_blocks * tiers.block_bytes, seconds)
    moved_bytes = tiers.metrics.moved_bytes.copy()
    for number, info in enumerate(tiers.infos[1:], start=1):
        if info.measured_bytes_per_s is not None:
            tiers.rates.observe_link(info.name, int(info.measured_bytes_per_s), 1.0)
        else:
            _measure_slower(tiers, number, num_blocks)
    tiers.metrics.moved_bytes = moved_bytes  # of requests only


def _measure_slower(tiers: TierStack, number: int, num_payloads: int) -> None:
    """Read payloads that are stored; where there are too few, write some for that."""
    slower, host = tiers.slower[number - 1], tiers.host
    start_s = time.perf_counter()
    usage = slower.tier.usage()
    keys = slower.tier.newest_keys(num_payloads)
    num_probes = min(num_payloads - len(keys), usage.capacity_payloads - usage.used_payloads)
    probes = [secrets.token_bytes(16) for _ in range(num_probes)]
    for key in probes:
        payload = host.reserve(key, State.SPILLING)
        payload.slowest = 0
        host.become_ready(payload)
        tiers.write(payload, number)
    _wait(tiers, slower, writes=True)
    for key in probes:
        host.discard(key)
    for key in [*keys, *probes]:
        if host.get(key) is None and slower.has(key):
            tiers.read(key, number)
    _wait(tiers, slower, writes=False)
    for key in [*keys, *probes]:
        host.discard(key)
    slower.tier.discard(probes)
    name = slower.tier.info.name
    if name not in tiers.rates.link_bytes_per_s:  # not one payload was read
        seconds = time.perf_counter() - start_s
        observed = (tiers.block_bytes, seconds) if slower.reads else (_ASSUMED_RATE, 1.0)
        tiers.rates.observe_link(name, *observed)


def _wait(tiers: TierStack, slower: SlowerTier, *, writes: bool) -> None:
    """Wait until writes or reads have ended, or a read is late, or there was time enough.

    What goes on keeps its host slot and ends as any other transfer does.
    """
    deadline_s = time.perf_counter() + _PROBE_S
    while slower.writes if writes else slower.reads:
        left_s = deadline_s - time.perf_counter()
        is_late = any(payload.state is State.LATE for payload in slower.reads.values())
        if is_late or left_s <= 0:
            return
        slower.tier.wait(left_s)
        tiers.poll_slower()
