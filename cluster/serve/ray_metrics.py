"""The metric sink of Ray actors: what is recorded shows in the dashboard and at each node's metrics agent."""

from __future__ import annotations

import logging

from ray.util import metrics

from cluster.observability.metrics import Metric

logger = logging.getLogger(__name__)


class RaySink:
    """Implements ``observability.MetricSink`` with ``ray.util.metrics``."""

    def __init__(self) -> None:
        self._instruments: dict[str, metrics.Counter | metrics.Gauge | metrics.Histogram | None] = {}

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        """Adds to a counter, sets a gauge, or observes a value of a histogram."""
        if metric.name not in self._instruments:
            self._instruments[metric.name] = _create(metric)
        match self._instruments[metric.name]:
            case metrics.Counter() as counter if value > 0:
                counter.inc(value, tags=labels)
            case metrics.Gauge() as gauge:
                gauge.set(value, tags=labels)
            case metrics.Histogram() as histogram:
                histogram.observe(value, tags=labels)


def _create(metric: Metric) -> metrics.Counter | metrics.Gauge | metrics.Histogram | None:
    try:
        match metric.kind:
            case "counter":
                return metrics.Counter(metric.name, description=metric.description, tag_keys=metric.labels)
            case "gauge":
                return metrics.Gauge(metric.name, description=metric.description, tag_keys=metric.labels)
            case "histogram":
                return metrics.Histogram(
                    metric.name,
                    description=metric.description,
                    boundaries=list(metric.buckets),
                    tag_keys=metric.labels,
                )
    except Exception:  # a metric that Ray refuses must not fail a request
        logger.exception("the metric %s cannot be recorded", metric.name)
        return None
