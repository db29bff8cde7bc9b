"""Metric names, and the sink they go to. ``serve`` installs Ray's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Metric:
    """A metric's definition. Durations are in seconds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()


_LATENCY_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

REPLICA_INFO = Metric(
    "cluster_replica_info",
    "gauge",
    "1 for each replica; its labels say what computes.",
    ("model", "replica", "device", "kernels", "weights"),
)
RUNNING = Metric("cluster_requests_running", "gauge", "Sequences in the running batch.", ("model", "replica"))
WAITING = Metric("cluster_requests_waiting", "gauge", "Sequences that wait in the engine.", ("model", "replica"))
KV_USAGE = Metric("cluster_kv_usage_ratio", "gauge", "Share of the KV blocks in use.", ("model", "replica"))
PREEMPTIONS = Metric("cluster_preemptions_total", "counter", "Sequences preempted.", ("model", "replica"))
PROMPT_TOKENS = Metric("cluster_prompt_tokens_total", "counter", "Prompt tokens taken in.", ("model",))
GENERATED_TOKENS = Metric("cluster_generated_tokens_total", "counter", "Tokens generated.", ("model",))
REQUESTS = Metric("cluster_requests_total", "counter", "Requests by outcome.", ("model", "outcome"))
TTFT_S = Metric("cluster_ttft_seconds", "histogram", "Time to first token.", ("model",), _LATENCY_S)
ITL_S = Metric("cluster_itl_seconds", "histogram", "Time between tokens of a candidate.", ("model",), _LATENCY_S)
E2E_S = Metric("cluster_e2e_seconds", "histogram", "Time to the last token.", ("model",), _LATENCY_S)


class MetricSink(Protocol):
    """Where measurements go. Calls are cheap, never block and never raise."""

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        """Adds to a counter, sets a gauge, or observes a value of a histogram."""
