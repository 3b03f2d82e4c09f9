"""The metrics of a fleet: its replicas, and what a front did with requests."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hotset.fleet.status import FleetStatus, ReplicaState
from hotset.server.histograms import histogram

# Counters of `FleetCounts`: its field -> metric, what it counts, and the label where it has one.
_COUNTERS = {
    "retried": ("retried", "Requests submitted again before their first token.", "why"),
    "resumed": ("resumed", "Outputs that went on at another replica.", "why"),
    "given_up": ("given_up", "Requests that left a replica and ended with an error.", "why"),
    "lost": ("replicas_lost", "Replicas whose link ended or was silent.", None),
    "silent": ("replicas_silent", "Of these, replicas that said nothing for 5 s.", None),
    "drains": ("drains", "Replicas that began to drain.", None),
    "late_outputs": ("late_outputs", "Outputs dropped: of a replica that a request left.", None),
    "num_predicted": ("predicted_requests", "Requests the router made a prediction for.", None),
    "predicted_tokens": ("predicted_tokens", "Tokens the router expected to be found.", None),
    "found_tokens": ("found_tokens", "Tokens found of the same requests.", None),
    "predicted_ttft_s": ("predicted_ttft_seconds", "Times to the first token, expected.", None),
    "real_ttft_s": ("real_ttft_seconds", "Those of the same requests, measured.", None),
    "snapshots": ("snapshots", "Snapshots of a replica's blocks asked for after a gap.", None),
}


class FleetFamilies(Collector):
    """Of one front. A replica that was lost has counters for as long as the status names it."""

    def __init__(self, fleet: FleetStatus) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """All of it, as of now."""
        yield from self._replicas()
        counts = self._fleet.counts
        routed = CounterMetricFamily(
            "hotset:fleet_routed",
            "Requests sent to a replica, by the reason of the choice.",
            labels=("replica", "why"),
        )
        for keys, count in dict(counts.routed).items():
            routed.add_metric(keys, count)
        yield routed
        for name, (metric, text, label) in _COUNTERS.items():
            value = getattr(counts, name)
            family = CounterMetricFamily(
                f"hotset:fleet_{metric}", text, labels=() if label is None else (label,)
            )
            for key, one in _items(value):
                family.add_metric(key, one)
            yield family
        yield histogram(
            "fleet_pause_seconds",
            "From the last token before a move to the first after it.",
            counts.pause,
        )

    def _replicas(self) -> Iterator[Metric]:
        replicas = self._fleet.replicas
        states = GaugeMetricFamily("hotset:fleet_replicas", "Replicas by state.", labels=("state",))
        for state in ReplicaState:
            states.add_metric((state,), sum(one.state is state for one in replicas))
        yield states
        open_requests = GaugeMetricFamily(
            "hotset:fleet_open_requests",
            "Requests of this front at a replica.",
            labels=("replica",),
        )
        queued = GaugeMetricFamily(
            "hotset:fleet_queued_tokens", "Prompt tokens ahead of a new one.", labels=("replica",)
        )
        for one in replicas:
            if one.state is not ReplicaState.LOST:
                open_requests.add_metric((one.replica_id,), one.num_open)
                queued.add_metric((one.replica_id,), one.queued_tokens)
        yield open_requests
        yield queued


def _items(value: float | Mapping[str, float]) -> list[tuple[tuple[str, ...], float]]:
    """Values by label, of a copy; a number alone has none."""
    if isinstance(value, Mapping):
        return [((key,), count) for key, count in dict(value).items()]
    return [((), value)]
