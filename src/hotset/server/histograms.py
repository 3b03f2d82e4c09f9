"""Our histograms as families for Prometheus."""

from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from hotset.engine.latency import Histogram


def histogram(name: str, text: str, values: Histogram) -> Metric:
    """A family without labels, with the buckets of `values`."""
    bounds = [*map(floatToGoString, values.bounds), "+Inf"]
    counts = list(accumulate(values.counts))
    return HistogramMetricFamily(
        f"hotset:{name}",
        text,
        buckets=list(zip(bounds, map(float, counts), strict=True)),
        sum_value=values.sum,
    )
