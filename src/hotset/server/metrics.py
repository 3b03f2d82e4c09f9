"""`/metrics` for Prometheus: vLLM's names, with `hotset:` before them, and what tiers add."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hotset.engine.latency import Latencies
from hotset.fleet.status import FleetStatus
from hotset.server.engine_metrics import EngineFamilies, EngineFigures
from hotset.server.fleet_metrics import FleetFamilies
from hotset.server.gate import HttpCounts
from hotset.server.histograms import histogram

_HISTOGRAMS = {
    "ttft": ("time_to_first_token_seconds", "From a request's arrival to its first token."),
    "itl": ("inter_token_latency_seconds", "Gaps between the tokens of one output."),
    "tpot": (
        "request_time_per_output_token_seconds",
        "A request's mean time per output token after the first.",
    ),
    "queue": ("request_queue_time_seconds", "From a request's arrival to its first step."),
    "e2e": ("e2e_request_latency_seconds", "From a request's arrival to its end."),
    "prompt_tokens": ("request_prompt_tokens", "Prompt tokens of a request."),
    "output_tokens": ("request_generation_tokens", "Tokens generated for a request."),
}


def exposition(
    engines: Sequence[EngineFigures],
    latencies: Latencies,
    http: HttpCounts,
    fleet: FleetStatus | None,
    accept: str,
) -> tuple[bytes, str]:
    """The page and its content type, in the format that `accept` asks for."""
    registry = CollectorRegistry()
    registry.register(_Server(latencies, http))
    registry.register(EngineFamilies(engines, () if fleet is None else ("replica",)))
    if fleet is not None:
        registry.register(FleetFamilies(fleet))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Server(Collector):
    """What the process that speaks HTTP counts."""

    def __init__(self, latencies: Latencies, http: HttpCounts) -> None:
        self._latencies = latencies
        self._http = http

    def collect(self) -> Iterator[Metric]:
        """All of it, as of now."""
        requests = CounterMetricFamily(
            "hotset:http_requests",
            "HTTP requests answered.",
            labels=("method", "path", "status"),
        )
        for (method, path, code), count in dict(self._http.requests).items():
            requests.add_metric((method, path, str(code)), count)
        yield requests
        yield GaugeMetricFamily(
            "hotset:http_requests_open", "HTTP requests being answered.", value=self._http.open
        )
        for name, (metric, text) in _HISTOGRAMS.items():
            yield histogram(metric, text, getattr(self._latencies, name))
