"""What the status page and `hotset top` show: the engine now, and its last minutes."""

import asyncio
import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client.registry import Collector

from hotset import __version__
from hotset.engine.status import EngineStatus
from hotset.engine.stream_service import StreamService
from hotset.errors import EngineError
from hotset.fleet.front_pages import FrontPages
from hotset.fleet.status import FleetStatus, HasFleet, ReplicaState
from hotset.fleet.sums import merge_engines
from hotset.metrics import Metrics
from hotset.server.body import Json
from hotset.server.engine_metrics import EngineFigures
from hotset.server.fleet_status import counts_body, fleet_body
from hotset.server.gate import HttpCounts
from hotset.server.metrics import FrontsFamilies, ServerFamilies, front_text

_HISTORY_S = 300
_RATE_OVER_S = 5
_LOOK_EVERY_S = 0.25  # however many clients look
_LOOK_WAIT_S = 0.5  # a step may take longer: then what was seen before it must do
_SHARES, _AT = ("p50", "p90", "p99"), (0.5, 0.9, 0.99)
# Counters of `hotset.metrics.Metrics`, by its names.
_TOTALS = (
    *("prompt_tokens", "output_tokens", "prefilled_tokens", "cached_tokens", "forked_tokens"),
    *("resumed_tokens", "fetched_tokens", "recomputed_tokens", "recompute_chosen_tokens"),
    *("preemptions", "turned_hot", "hot_hits", "hot_misses", "hot_guessed", "hot_guessed_right"),
    *("moved_bytes", "tier_bytes"),
    *("state_hits", "spilled_states", "fetched_states", "dropped_states", "stateless_tokens"),
)
_EXPERTS = ("hits", "misses", "bytes", "predicted", "predicted_right", "copied_ahead")


@dataclasses.dataclass(frozen=True, slots=True)
class _Sample:
    """Counters at one moment; `by_replica` are output tokens."""

    time_s: float
    output_tokens: int
    computed_tokens: int
    prompt_tokens: int
    moved_bytes: Mapping[str, int]
    num_open: int
    by_replica: Mapping[str, int]


class StatusBoard:
    """Samples the counters once a second, and looks at the engine when a client asks.

    Args:
        service: has the engine, or a fleet.
        http: what the server has answered.
        fronts_path: folder in which a front shows the others its counts; None where it has none.
    """

    def __init__(
        self, service: StreamService, http: HttpCounts, fronts_path: Path | None = None
    ) -> None:
        self._service = service
        self._http = http
        self._pages: FrontPages | None = None
        if fronts_path is not None and (fleet := self.fleet()) is not None:
            self._pages = FrontPages(fronts_path, fleet.front_id)
        self._samples: deque[_Sample] = deque([self._sample()], maxlen=_HISTORY_S + 1)
        self._start_s = time.time()
        self._looked_s = 0.0
        self._look: asyncio.Future[EngineStatus] | None = None  # under way
        self._seen: EngineStatus | None = None

    async def run(self) -> None:
        """Sample until cancelled, and tell other fronts."""
        try:
            while True:
                await asyncio.sleep(1.0)
                self._samples.append(self._sample())
                if self._pages is not None:
                    with contextlib.suppress(OSError):  # then others do without for a while
                        await asyncio.to_thread(self._pages.write, self._page())
        finally:
            if self._pages is not None:
                self._pages.close()

    def fleet(self) -> FleetStatus | None:
        """The replicas; None where there is one engine."""
        return self._service.fleet() if isinstance(self._service, HasFleet) else None

    def own_metrics(self) -> Collector:
        """What this process counts; of a fleet, what all fronts do."""
        fleet = self.fleet()
        if fleet is None:
            return ServerFamilies(self._service.latencies, self._http)
        own = front_text(self._service.latencies, self._http, fleet)
        return FrontsFamilies([own, *(page["metrics"] for page in self._other_pages())])

    def _page(self) -> Json:
        fleet = self.fleet()
        assert fleet is not None
        return {
            "counts": counts_body(fleet.counts),
            "metrics": front_text(self._service.latencies, self._http, fleet),
        }

    def _other_pages(self) -> list[Json]:
        return [] if self._pages is None else self._pages.others()

    async def engines(self) -> list[EngineFigures]:
        """The engine, or each replica, for a scrape. Raises EngineError."""
        status, fleet = await self.look(), self.fleet()
        if fleet is None:
            return [EngineFigures((), self._service.metrics, status)]
        return [
            EngineFigures(
                (one.replica_id,),
                one.metrics,
                None if one.state is ReplicaState.LOST else one.engine,
            )
            for one in fleet.replicas
        ]

    async def look(self) -> EngineStatus:
        """The engine as of now, or as of its last answer; of a fleet, all replicas together.

        Raises:
            EngineError: there is no answer. A fleet has one even without replicas.
        """
        if self.fleet() is None:
            return await self._look_at_service()
        with contextlib.suppress(EngineError):
            await self._look_at_service()
        fleet = self.fleet()  # with what this look has brought
        assert fleet is not None
        seen = [one.engine for one in fleet.replicas if one.state is not ReplicaState.LOST]
        return merge_engines([one for one in seen if one is not None])

    async def _look_at_service(self) -> EngineStatus:
        self._service.raise_unless_healthy()
        now_s = time.monotonic()
        if self._look is None and now_s - self._looked_s > _LOOK_EVERY_S:
            self._looked_s = now_s
            self._look = asyncio.wrap_future(self._service.status())
            self._look.add_done_callback(self._keep)
        if self._look is not None:
            timeout_s = None if self._seen is None else _LOOK_WAIT_S
            await asyncio.wait([self._look], timeout=timeout_s)
        if self._seen is None:
            raise EngineError("the engine does not answer")
        return self._seen

    def _keep(self, look: "asyncio.Future[EngineStatus]") -> None:
        self._look = None
        if not look.cancelled() and look.exception() is None:
            self._seen = look.result()

    async def body(self) -> Json:
        """All of it as JSON. Raises EngineError."""
        engine = await self.look()
        service, metrics = self._service, self._service.metrics
        now = self._sample()
        before = self._before(now)
        seconds = max(1e-3, now.time_s - before.time_s)
        moved = {
            way: (count - before.moved_bytes.get(way, 0)) / seconds
            for way, count in now.moved_bytes.items()
        }
        return {
            "model": service.model.name,
            "version": __version__,
            "uptime_s": round(time.time() - self._start_s),
            "engine": dataclasses.asdict(engine),
            "fleet": self._fleet_body(now, before, seconds),
            "rates": {
                "output_tokens_per_s": (now.output_tokens - before.output_tokens) / seconds,
                "computed_tokens_per_s": (now.computed_tokens - before.computed_tokens) / seconds,
                "moved_bytes_per_s": moved,
            },
            "latency_s": {
                name: dict(
                    zip(_SHARES, getattr(service.latencies, name).percentiles(*_AT), strict=True)
                )
                for name in ("ttft", "itl", "tpot", "queue", "e2e")
            },
            "totals": _totals(metrics),
            "history": self._history(),
        }

    def _fleet_body(self, now: _Sample, before: _Sample, seconds: float) -> Json | None:
        fleet = self.fleet()
        if fleet is None:
            return None
        # A replica that has started again counts from zero.
        rates = {
            replica: max(0, count - before.by_replica.get(replica, count)) / seconds
            for replica, count in now.by_replica.items()
        }
        return fleet_body(fleet, rates, [page["counts"] for page in self._other_pages()])

    def _before(self, now: _Sample) -> _Sample:
        """The newest sample that is old enough for a steady rate, or the oldest."""
        for sample in reversed(self._samples):
            if now.time_s - sample.time_s >= _RATE_OVER_S:
                return sample
        return self._samples[0]

    def _history(self) -> dict[str, list[Any]]:
        """A value for each second, oldest first; rates over the seconds before it."""
        samples = list(self._samples)
        pairs = [(samples[max(0, i - _RATE_OVER_S)], samples[i]) for i in range(1, len(samples))]
        return {
            "output_tokens_per_s": [
                round((b.output_tokens - a.output_tokens) / (b.time_s - a.time_s), 1)
                for a, b in pairs
            ],
            "open_requests": [b.num_open for _, b in pairs],
        }

    def _sample(self) -> _Sample:
        metrics, fleet = self._service.metrics, self.fleet()
        replicas = () if fleet is None else fleet.replicas
        return _Sample(
            time.monotonic(),
            metrics.output_tokens,
            metrics.computed_tokens,
            metrics.prompt_tokens,
            dict(metrics.moved_bytes),
            self._service.num_open,
            {one.replica_id: one.metrics.output_tokens for one in replicas},
        )


def _totals(metrics: Metrics) -> Json:
    counts = {name: getattr(metrics, name) for name in _TOTALS}
    counts["experts"] = {name: getattr(metrics, f"expert_{name}") for name in _EXPERTS}
    counts["finished"] = metrics.requests_finished
    counts["faults"] = {kind: count for kind, count in metrics.faults.items() if count}
    return {name: dict(one) if isinstance(one, dict) else one for name, one in counts.items()}
