"""`/metrics` for Prometheus: vLLM's names, with `hotset:` before them, and what tiers add."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from hotset.engine.latency import Histogram
from hotset.engine.status import EngineStatus
from hotset.engine.stream_service import StreamService
from hotset.server.gate import HttpCounts

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


# Counters of `hotset.metrics.Metrics`: its field -> what it counts.
_REQUEST_COUNTERS = {
    "prompt_tokens": "Prompt tokens of accepted requests.",
    "output_tokens": "Tokens generated.",
    "computed_tokens": "Tokens that went through the model.",
    "preemptions": "Requests preempted.",
    "steps": "Model steps.",
    "step_s": "Time in model steps.",
}
_KV_COUNTERS = {
    "forked_tokens": "Prompt tokens that an output shares with another of its n outputs.",
    "recomputed_tokens": "Tokens computed again for the same request.",
    "spilled_blocks": "Blocks copied down.",
    "fetched_blocks": "Blocks copied up.",
}
_STATE_COUNTERS = {
    "spilled_states": "States of requests copied down.",
    "fetched_states": "States copied up.",
    "dropped_states": "States without a slot, or that left it before they were copied down.",
    "stateless_tokens": "Tokens whose KV was found, to no use for want of a state.",
}
_HOT_COUNTERS = {
    "turned_hot": "Requests that gave back blocks and kept the tokens used last.",
    "hot_hits": "Tokens that hot requests selected, per layer, and had on the device.",
    "hot_misses": "Likewise, that came from host memory.",
}
_EXPERT_COUNTERS = {
    "expert_hits": "Experts that were needed and had a slot.",
    "expert_misses": "Experts that were needed and had no slot.",
    "expert_bytes": "Bytes of experts to the device.",
    "expert_predicted": "Experts that a layer's router chose before the layer was there.",
    "expert_predicted_right": "Of these, needed.",
    "expert_copied_ahead": "Experts copied ahead: predicted, and without a slot.",
    "expert_cpu_computed": "Experts that had no slot and that the CPU computed.",
    "expert_disk_reads": "Experts read from disk.",
    "expert_disk_bytes": "Bytes of experts read from disk.",
    "expert_disk_wait_s": "Time for which steps waited for experts on disk.",
    "split_moves": "Times a new split between experts and KV was chosen.",
}
# Fields whose metrics have other names, some of them vLLM's.
_NAMES = {
    "output_tokens": "generation_tokens",
    "preemptions": "num_preemptions",
    "steps": "engine_steps",
    "step_s": "engine_step_seconds",
    "expert_predicted": "expert_prefetch_predicted",
    "expert_predicted_right": "expert_prefetch_correct",
    "expert_copied_ahead": "expert_prefetch_copied",
    "expert_disk_wait_s": "expert_disk_wait_seconds",
}


def exposition(
    service: StreamService, status: EngineStatus, http: HttpCounts, accept: str
) -> tuple[bytes, str]:
    """The page and its content type, in the format that `accept` asks for."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(service, status, http))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Snapshot(Collector):
    def __init__(self, service: StreamService, status: EngineStatus, http: HttpCounts) -> None:
        self._latencies = service.latencies
        self._metrics = service.metrics
        self._status = status
        self._http = http

    def collect(self) -> Iterator[Metric]:
        """All metrics, as of now."""
        yield from self._requests()
        yield from self._prefixes()
        yield from self._tiers()
        yield from self._experts()
        yield _labelled(
            "faults",
            "What went wrong and was dealt with, by kind.",
            ("kind",),
            _by_one(self._metrics.faults),
        )
        for name, (metric, text) in _HISTOGRAMS.items():
            yield _histogram(metric, text, getattr(self._latencies, name))

    def _counters(self, fields: dict[str, str]) -> Iterator[Metric]:
        for name, text in fields.items():
            yield _counter(_NAMES.get(name, name), text, getattr(self._metrics, name))

    def _requests(self) -> Iterator[Metric]:
        status = self._status
        running = status.num_moving + status.num_hot + status.num_fetching
        yield _gauge("num_requests_running", "Requests in the engine's steps.", running)
        yield _gauge("num_requests_waiting", "Requests not started yet.", status.num_waiting)
        yield _gauge(
            "num_requests_parked", "Preempted, their KV in a slower tier.", status.num_parked
        )
        yield _gauge("num_requests_fetching", "Running, waiting for their KV.", status.num_fetching)
        yield _gauge(
            "num_requests_hot", "Running with few of their tokens on the device.", status.num_hot
        )
        yield from self._counters(_REQUEST_COUNTERS)
        yield _labelled(
            "request_success",
            "Requests that ended, by finish reason.",
            ("finished_reason",),
            _by_one(self._metrics.requests_finished),
        )
        yield _labelled(
            "http_requests",
            "HTTP requests answered.",
            ("method", "path", "status"),
            (
                ((method, path, str(code)), n)
                for (method, path, code), n in dict(self._http.requests).items()
            ),
        )
        yield _gauge("http_requests_open", "HTTP requests being answered.", self._http.open)

    def _prefixes(self) -> Iterator[Metric]:
        metrics = self._metrics
        cached = dict(metrics.cached_tokens)
        yield _counter("prefix_cache_queries", "Prompt tokens looked up.", metrics.prompt_tokens)
        yield _counter("prefix_cache_hits", "Of these, found in any tier.", sum(cached.values()))
        yield _labelled(
            "cached_tokens",
            "Prompt tokens found instead of computed, by tier.",
            ("tier",),
            _by_one(cached),
        )
        yield _labelled(
            "resumed_tokens",
            "Tokens that a preempted request had again without computing them, by tier.",
            ("tier",),
            _by_one(metrics.resumed_tokens),
        )
        yield _labelled(
            "prefix_decisions_tokens",
            "Tokens found in a slower tier: fetched, or computed as that was cheaper.",
            ("choice",),
            _by_one(
                {"fetch": metrics.fetched_tokens, "recompute": metrics.recompute_chosen_tokens}
            ),
        )
        yield from self._counters(_KV_COUNTERS)
        yield from self._counters(_HOT_COUNTERS)
        yield _labelled(
            "state_hits",
            "States that requests went on from, by tier.",
            ("tier",),
            _by_one(metrics.state_hits),
        )
        yield from self._counters(_STATE_COUNTERS)

    def _tiers(self) -> Iterator[Metric]:
        status = self._status
        device = status.tiers[0]
        held = sum(device.cells.count(state) for state in "hsad")
        yield _gauge(
            "kv_cache_usage_perc",
            "Share of the device's KV blocks that requests hold, 0 to 1.",
            held / max(1, len(device.cells)),
        )
        for name, text in (("capacity", "Blocks a tier can hold."), ("used", "Blocks in use.")):
            gauge = GaugeMetricFamily(f"hotset:tier_{name}_blocks", text, labels=["tier"])
            for tier in status.tiers:
                gauge.add_metric([tier.name], getattr(tier, name))
            yield gauge
        yield from self._states()
        yield _labelled(
            "moved_bytes",
            "Bytes moved between tiers.",
            ("source", "target"),
            ((tuple(way.split(">")), n) for way, n in dict(self._metrics.moved_bytes).items()),
        )
        link = GaugeMetricFamily(
            "hotset:link_bytes_per_second", "Measured rate to the device.", labels=["tier"]
        )
        for name, rate in status.link_bytes_per_s.items():
            link.add_metric([name], rate)
        yield link

    def _states(self) -> Iterator[Metric]:
        states = self._status.states
        size, counts = 0, {"device": 0}
        if states is not None:
            size = states.num_slots * states.slot_bytes
            counts = {"device": states.num_kept, **states.below}
        yield _gauge("state_bytes", "Of slots for states on the device.", size)
        kept = GaugeMetricFamily(
            "hotset:kept_states", "States that can be found, by tier.", labels=["tier"]
        )
        for tier, count in counts.items():
            kept.add_metric([tier], count)
        yield kept

    def _experts(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield from self._counters(_EXPERT_COUNTERS)
        yield _gauge(
            "expert_rounding_error",
            "Relative RMS error of experts' weights, which expert_cold_dtype has rounded.",
            metrics.expert_rounding_error,
        )
        for name, size in (("expert", metrics.split_expert_bytes), ("kv", metrics.split_kv_bytes)):
            yield _gauge(
                f"split_{name}_bytes", "Of a split that moves, bytes on the device now.", size
            )


def _by_one(values: Mapping[str, float]) -> Iterator[tuple[tuple[str, ...], float]]:
    """Values by one label, of a copy: the engine's thread may add a key meanwhile."""
    return (((label,), value) for label, value in dict(values).items())


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"hotset:{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"hotset:{name}", text, value=value)


def _labelled(
    name: str,
    text: str,
    labels: tuple[str, ...],
    values: Iterable[tuple[tuple[str, ...], float]],
) -> Metric:
    family = CounterMetricFamily(f"hotset:{name}", text, labels=labels)
    for keys, value in values:
        family.add_metric(keys, value)
    return family


def _histogram(name: str, text: str, values: Histogram) -> Metric:
    bounds = [*map(floatToGoString, values.bounds), "+Inf"]
    counts = list(accumulate(values.counts))
    return HistogramMetricFamily(
        f"hotset:{name}",
        text,
        buckets=list(zip(bounds, map(float, counts), strict=True)),
        sum_value=values.sum,
    )
