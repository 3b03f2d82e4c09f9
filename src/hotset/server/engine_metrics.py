"""The metrics of engines, each with the label of its replica where there are several."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hotset.engine.status import EngineStatus
from hotset.metrics import Metrics

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
    "hot_guessed": "Tokens that came ahead, as a layer was guessed to select them.",
    "hot_guessed_right": "Of these, selected: they are among the hits.",
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
# Of each rank: the metric's name -> a field of `RankMemory`, and what it is.
_RANK_GAUGES = {
    "rank_device_used_bytes": ("used_bytes", "Memory of a rank's device in use."),
    "rank_device_bytes": ("total_bytes", "Memory of a rank's device."),
    "rank_host_bytes": ("host_bytes", "Host memory of a rank for KV and experts."),
    "rank_disk_bytes": ("disk_bytes", "Most that a rank may write to disk."),
    "rank_link_bytes_per_second": (
        "link_bytes_per_s",
        "Measured rate of a rank's KV from host memory; 0 before any came.",
    ),
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


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """An engine, as a scrape takes it.

    Attributes:
        labels: of each of its metrics: a replica's `(id,)`, and nothing where there is one engine.
        status: None where it has not been looked at; then it has no gauges.
    """

    labels: tuple[str, ...]
    metrics: Metrics
    status: EngineStatus | None


class EngineFamilies(Collector):
    """What engines count and hold."""

    def __init__(self, engines: Sequence[EngineFigures]) -> None:
        self._engines = engines
        self._labels = ("replica",) if any(one.labels for one in engines) else ()

    def collect(self) -> Iterator[Metric]:
        """All of it, as of now."""
        yield from self._requests()
        yield from self._prefixes()
        yield from self._tiers()
        yield from self._ranks()
        yield from self._experts()
        text = "What went wrong and was dealt with, by kind."
        yield self._split("faults", text, ("kind",), lambda one: one.faults)

    def _counter(self, name: str, text: str, value: Callable[[Metrics], float]) -> Metric:
        family = CounterMetricFamily(f"hotset:{name}", text, labels=self._labels)
        for engine in self._engines:
            family.add_metric(engine.labels, value(engine.metrics))
        return family

    def _counters(self, fields: dict[str, str]) -> Iterator[Metric]:
        for name, text in fields.items():
            yield self._counter(_NAMES.get(name, name), text, attrgetter(name))

    def _split(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...],
        values: Callable[[Metrics], Mapping[str, float]],
    ) -> Metric:
        """A counter with labels of its own; keys have one of `> ` between two of them."""
        family = CounterMetricFamily(f"hotset:{name}", text, labels=(*self._labels, *labels))
        for engine in self._engines:
            # Of a copy: the engine's thread may add a key meanwhile.
            for key, value in dict(values(engine.metrics)).items():
                keys = [key] if len(labels) == 1 else re.split("[> ]", key, maxsplit=1)
                family.add_metric((*engine.labels, *keys), value)
        return family

    def _gauge(self, name: str, text: str, value: Callable[[EngineStatus], float]) -> Metric:
        family = GaugeMetricFamily(f"hotset:{name}", text, labels=self._labels)
        for engine in self._engines:
            if engine.status is not None:
                family.add_metric(engine.labels, value(engine.status))
        return family

    def _by_tier(
        self, name: str, text: str, values: Callable[[EngineStatus], Mapping[str, float]]
    ) -> Metric:
        family = GaugeMetricFamily(f"hotset:{name}", text, labels=(*self._labels, "tier"))
        for engine in self._engines:
            if engine.status is not None:
                for tier, value in values(engine.status).items():
                    family.add_metric((*engine.labels, tier), value)
        return family

    def _fixed(self, name: str, text: str) -> Metric:
        """A field of the counters that does not only grow."""
        family = GaugeMetricFamily(f"hotset:{name}", text, labels=self._labels)
        for engine in self._engines:
            family.add_metric(engine.labels, getattr(engine.metrics, name))
        return family

    def _requests(self) -> Iterator[Metric]:
        for name, text, value in (
            (
                "running",
                "Requests in the engine's steps.",
                lambda one: one.num_moving + one.num_hot + one.num_fetching,
            ),
            ("waiting", "Requests not started yet.", attrgetter("num_waiting")),
            ("parked", "Preempted, their KV in a slower tier.", attrgetter("num_parked")),
            ("fetching", "Running, waiting for their KV.", attrgetter("num_fetching")),
            ("hot", "Running with few of their tokens on the device.", attrgetter("num_hot")),
        ):
            yield self._gauge(f"num_requests_{name}", text, value)
        yield from self._counters(_REQUEST_COUNTERS)
        yield self._split(
            "request_success",
            "Requests that ended, by finish reason.",
            ("finished_reason",),
            lambda one: one.requests_finished,
        )

    def _prefixes(self) -> Iterator[Metric]:
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up.", attrgetter("prompt_tokens")
        )
        yield self._counter(
            "prefix_cache_hits",
            "Of these, found in any tier.",
            lambda one: sum(dict(one.cached_tokens).values()),
        )
        yield self._split(
            "cached_tokens",
            "Prompt tokens found instead of computed, by tier.",
            ("tier",),
            lambda one: one.cached_tokens,
        )
        yield self._split(
            "resumed_tokens",
            "Tokens that a preempted request had again without computing them, by tier.",
            ("tier",),
            lambda one: one.resumed_tokens,
        )
        yield self._split(
            "prefix_decisions_tokens",
            "Tokens found in a slower tier: fetched, or computed as that was cheaper.",
            ("choice",),
            lambda one: {"fetch": one.fetched_tokens, "recompute": one.recompute_chosen_tokens},
        )
        yield from self._counters(_KV_COUNTERS)
        yield from self._counters(_HOT_COUNTERS)
        yield self._split(
            "state_hits",
            "States that requests went on from, by tier.",
            ("tier",),
            lambda one: one.state_hits,
        )
        yield from self._counters(_STATE_COUNTERS)

    def _tiers(self) -> Iterator[Metric]:
        yield self._gauge(
            "kv_cache_usage_perc",
            "Share of the device's KV blocks that requests hold, 0 to 1.",
            _held_share,
        )
        yield self._by_tier(
            "tier_capacity_blocks",
            "Blocks a tier can hold.",
            lambda one: {tier.name: tier.capacity for tier in one.tiers},
        )
        yield self._by_tier(
            "tier_used_blocks",
            "Blocks in use.",
            lambda one: {tier.name: tier.used for tier in one.tiers},
        )
        yield self._gauge(
            "state_bytes",
            "Of slots for states on the device.",
            lambda one: 0 if one.states is None else one.states.num_slots * one.states.slot_bytes,
        )
        yield self._by_tier("kept_states", "States that can be found, by tier.", _kept_states)
        yield self._split(
            "moved_bytes",
            "Bytes moved between tiers.",
            ("source", "target"),
            lambda one: one.moved_bytes,
        )
        yield self._split(
            "tier_bytes",
            "Bytes of a tier by what became of them: read for the first time, or declined.",
            ("tier", "what"),
            lambda one: one.tier_bytes,
        )
        yield self._by_tier(
            "link_bytes_per_second",
            "Measured rate to the device.",
            lambda one: one.link_bytes_per_s,
        )

    def _ranks(self) -> Iterator[Metric]:
        for name, (field, text) in _RANK_GAUGES.items():
            family = GaugeMetricFamily(f"hotset:{name}", text, labels=(*self._labels, "rank"))
            for engine in self._engines:
                for rank, one in enumerate(() if engine.status is None else engine.status.ranks):
                    family.add_metric((*engine.labels, str(rank)), getattr(one, field))
            yield family

    def _experts(self) -> Iterator[Metric]:
        yield from self._counters(_EXPERT_COUNTERS)
        yield self._fixed(
            "expert_rounding_error",
            "Relative RMS error of experts' weights, which expert_cold_dtype has rounded.",
        )
        for name in ("split_expert_bytes", "split_kv_bytes"):
            yield self._fixed(name, "Of a split that moves, bytes on the device now.")


def _held_share(status: EngineStatus) -> float:
    cells = status.tiers[0].cells  # of the device
    return sum(cells.count(state) for state in "hsad") / max(1, len(cells))


def _kept_states(status: EngineStatus) -> Mapping[str, float]:
    if status.states is None:
        return {"device": 0}
    return {"device": status.states.num_kept, **status.states.below}
