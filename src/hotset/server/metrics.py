"""`/metrics` for Prometheus: vLLM's names, with `hotset:` before them, and what tiers add."""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
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


def exposition(engines: Sequence[EngineFigures], own: Collector, accept: str) -> tuple[bytes, str]:
    """The page and its content type, in the format that `accept` asks for.

    `own` is what the process that speaks HTTP counts, or what all fronts do.
    """
    registry = CollectorRegistry()
    registry.register(own)
    registry.register(EngineFamilies(engines))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def front_text(latencies: Latencies, http: HttpCounts, fleet: FleetStatus) -> str:
    """What a front counts, each metric with its id as the label `front`."""
    registry = CollectorRegistry()
    registry.register(_OfFront(fleet.front_id, ServerFamilies(latencies, http)))
    registry.register(_OfFront(fleet.front_id, FleetFamilies(fleet)))
    return generate_latest(registry).decode()


class _OfFront(Collector):
    def __init__(self, front_id: str, families: Collector) -> None:
        self._front_id = front_id
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families.collect():
            family.samples = [
                sample._replace(labels={"front": self._front_id, **sample.labels})
                for sample in family.samples
            ]
            yield family


class FrontsFamilies(Collector):
    """Of several fronts: their `front_text`, with the samples of a family in one place."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        """All of it, as of the texts."""
        families: dict[str, Metric] = {}
        for text in self._texts:
            for family in text_string_to_metric_families(text):
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples += family.samples
        return families.values()


class ServerFamilies(Collector):
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
