"""What is under way between host memory and one slower tier, and how fast. Imports no torch."""

from collections.abc import Iterable, Iterator
from itertools import islice

from hotset.clock import Clock
from hotset.cost.rates import Rates
from hotset.memory.journal import OnChange
from hotset.memory.residency import Payload, Residency, State
from hotset.memory.tier import Answer, Completion, CompletionStatus, Tier
from hotset.metrics import Metrics

_RATE_WINDOW_S = 0.25
_MOST_OWED = 1 << 16
# What is owed waits so long at most for a moment without requests, from which writing takes time.
_OWED_WAIT_S = 10.0
# Of host memory, what is being written at most of what is owed to a tier; and payloads.
_WRITING_PART, _MOST_WRITING = 8, 64


class SlowerTier:
    """A tier with its transfers, each of which has a payload of host memory.

    Args:
        tier: as below.
        host: the name of host memory, for metrics.
        block_bytes: that a payload counts for.
        rates: to be followed.
        metrics: to be counted in.
        clock: what rates are measured by.

    Attributes:
        tier: that stores the payloads.
        reads: payloads that are being read, by the tier's transfer id.
        writes: payloads that are being written, likewise.
        owed: keys of payloads that are to be written to it, first those that were first owed, each
            with the time from which it is written beside requests too.
    """

    def __init__(
        self, tier: Tier, host: str, block_bytes: int, rates: Rates, metrics: Metrics, clock: Clock
    ) -> None:
        self.tier = tier
        self.reads: dict[int, Payload] = {}
        self.writes: dict[int, Payload] = {}
        self.owed: dict[bytes, float] = {}
        self._block_bytes = block_bytes
        self._host = host
        self._rates = rates
        self._metrics = metrics
        self._clock = clock
        self._window_start_s = 0.0
        self._window_bytes = 0
        self._measured_bytes_per_s = tier.info.measured_bytes_per_s

    @property
    def is_busy(self) -> bool:
        """Whether reads or writes are under way, or to come."""
        return bool(self.reads or self.writes or self.owed)

    def has(self, key: bytes) -> bool:
        """Whether it says at once that it has a payload."""
        return self.tier.lookup([key], may_ask=False)[0] is Answer.HIT

    def owe(self, keys: Iterable[bytes], *, at_once: bool = False) -> None:
        """Have payloads written once they are in host memory; the last owed may be left.

        When no request runs or some time has passed, unless `at_once`.
        """
        due_s = 0.0 if at_once else self._clock.now() + _OWED_WAIT_S
        for key in keys:
            self.owed.setdefault(key, due_s)
        while len(self.owed) > _MOST_OWED:
            self.owed.popitem()

    def due(self, host: Residency, *, is_idle: bool) -> Iterator[Payload]:
        """READY payloads that are owed and to be written now: with a part of host memory at once.

        Forgets what is not there, and what the tier has.
        """
        most = max(1, min(_MOST_WRITING, host.num_slots // _WRITING_PART))
        now_s = self._clock.now()
        for key, due_s in list(islice(self.owed.items(), 4 * most)):
            if len(self.writes) >= most or not (is_idle or due_s <= now_s):
                return
            payload = host.get(key)
            if payload is not None and payload.state is State.SPILLING:
                continue  # once it has come, see `TierStack`
            if payload is None or not payload.is_ready or self.has(key):
                del self.owed[key]
            else:
                yield payload

    def all_keys(self) -> list[bytes]:
        """See `journal.Source`."""
        return self.tier.newest_keys(self.tier.info.capacity_payloads)

    @property
    def on_change(self) -> OnChange | None:
        """See `journal.Source`."""
        return self.tier.on_change

    @on_change.setter
    def on_change(self, on_change: OnChange | None) -> None:
        self.tier.on_change = on_change

    def read(self, payload: Payload, into: memoryview) -> None:
        """Start reading a payload into its slot."""
        if not self.reads:
            self._window_start_s = self._clock.now()
            self._window_bytes = 0
        self.reads[self.tier.submit_read(payload.key, into)] = payload

    def write(self, payload: Payload, content: memoryview) -> bool:
        """Start writing a payload from its slot; False where the tier drops it."""
        must = payload.key in self.owed
        self.owed.pop(payload.key, None)
        transfer_id = self.tier.submit_write(payload.key, content, must=must)
        if transfer_id is None:
            return False
        self.writes[transfer_id] = payload
        return True

    def poll(self) -> list[tuple[Payload, Completion, bool]]:
        """What ended since the last call, or is late: payload, completion, whether it was read."""
        ended = []
        for completion in self.tier.poll():
            transfer_id = completion.transfer_id
            is_read = transfer_id in self.reads
            transfers = self.reads if is_read else self.writes
            payload = transfers[transfer_id]
            if completion.status is not CompletionStatus.LATE:
                del transfers[transfer_id]
            if completion.status is CompletionStatus.OK:
                self._count(is_read)
            ended.append((payload, completion, is_read))
        usage = self.tier.usage()
        for kind, count in usage.faults.items():
            self._metrics.faults[kind] = count
        rate = usage.measured_bytes_per_s
        if rate is not None and rate != self._measured_bytes_per_s:
            self._rates.link_bytes_per_s[self.tier.info.name] = rate
            self._measured_bytes_per_s = rate
        for what, num_bytes in usage.byte_counts.items():
            self._metrics.tier_bytes[f"{self.tier.info.name} {what}"] = num_bytes
        return ended

    def _count(self, is_read: bool) -> None:
        name = self.tier.info.name
        way = f"{name}>{self._host}" if is_read else f"{self._host}>{name}"
        self._metrics.moved_bytes[way] += self._block_bytes
        if not is_read:
            return
        self._window_bytes += self._block_bytes
        seconds = self._clock.now() - self._window_start_s
        if not self.reads or seconds > _RATE_WINDOW_S:
            self._rates.observe_link(name, self._window_bytes, seconds)
            self._window_start_s = self._clock.now()
            self._window_bytes = 0
