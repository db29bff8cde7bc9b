"""Measurements kept in this process, until somebody reads them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from cluster.observability.metrics import Metric, MetricSink

_Labels = tuple[str, ...]


class MetricTable:
    """A ``MetricSink`` that adds up. Recording takes less than a microsecond: it is done for every token."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}
        self._values: dict[str, dict[_Labels, float]] = {}
        self._histograms: dict[str, dict[_Labels, _Histogram]] = {}

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        """Adds to a counter, sets a gauge, or observes a value of a histogram."""
        name = metric.name
        if name not in self._metrics:
            self._metrics[name] = metric
            (self._histograms if metric.kind == "histogram" else self._values)[name] = {}
        key = tuple([labels[label] for label in metric.labels])
        if metric.kind == "histogram":
            histograms = self._histograms[name]
            histogram = histograms.get(key)
            if histogram is None:
                histogram = histograms[key] = _Histogram(metric.buckets)
            histogram.observe(value)
        else:
            values = self._values[name]
            values[key] = values.get(key, 0.0) + value if metric.kind == "counter" else value

    def families(self) -> Iterator[Family]:
        """Everything recorded so far, as Prometheus' client knows it."""
        for metric in self._metrics.values():
            yield self.family(metric, name=metric.name, labels=metric.labels)

    def family(self, metric: Metric, *, name: str, labels: tuple[str, ...]) -> Family:
        """One metric, also where nothing was recorded.

        Args:
            name: what it is called outside.
            labels: what its labels are called there, in their order.
        """
        if metric.kind == "histogram":
            family = HistogramMetricFamily(name, metric.description, labels=labels)
            for key, histogram in self._histograms.get(metric.name, {}).items():
                family.add_metric(key, buckets=histogram.buckets(), sum_value=histogram.total)
            return family
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = kind(name, metric.description, labels=labels)
        for key, value in self._values.get(metric.name, {}).items():
            family.add_metric(key, value)
        return family


class _Histogram:
    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound and how many are not above it."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(map(float, self._counts)), strict=True))


class SinkPair:
    """Records everything twice."""

    def __init__(self, first: MetricSink, second: MetricSink) -> None:
        self._first = first
        self._second = second

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        self._first.record(metric, value, **labels)
        self._second.record(metric, value, **labels)
