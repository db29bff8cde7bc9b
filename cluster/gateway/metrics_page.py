"""What ``/metrics`` shows: the gateway's own measurements, and the names that dashboards and autoscalers look for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry

from cluster.gateway.catalog import Catalog
from cluster.observability.metric_table import MetricTable
from cluster.observability.metrics import E2E_S, GENERATED_TOKENS, ITL_S, PROMPT_TOKENS, REQUESTS, TTFT_S

# As vLLM calls what is ours; "engine" is a replica, or the gateway itself for what waits here.
_ENGINE_LABELS = ("model_name", "engine")
_GATEWAY = "gateway"
_RENAMED = (
    (PROMPT_TOKENS, "vllm:prompt_tokens_total"),
    (GENERATED_TOKENS, "vllm:generation_tokens_total"),
    (TTFT_S, "vllm:time_to_first_token_seconds"),
    (ITL_S, "vllm:inter_token_latency_seconds"),
    (E2E_S, "vllm:e2e_request_latency_seconds"),
)


class MetricsPage(Collector):
    """Gathers when it is asked. Several gateways show the same replicas: their gauges are to be taken once per engine.

    Args:
        table: what was recorded here.
    """

    def __init__(self, catalog: Catalog, table: MetricTable) -> None:
        self._catalog = catalog
        self._table = table
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type, in the format that an ``Accept`` header prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Family]:
        yield from self._engines()
        for metric, name in _RENAMED:
            yield self._table.family(metric, name=name, labels=("model_name",))
        yield self._successes()
        yield from self._table.families()

    def _engines(self) -> Iterator[Family]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Sequences in running batches.", labels=_ENGINE_LABELS)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait.", labels=_ENGINE_LABELS)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the KV blocks in use.", labels=_ENGINE_LABELS)
        for entry in self._catalog:
            for replica in entry.balancer.describe().replicas:
                key = (entry.name, replica.replica_id)
                running.add_metric(key, replica.running)
                waiting.add_metric(key, replica.waiting)
                usage.add_metric(key, replica.kv_usage)
            backlog = entry.admission.backlog().values()
            waiting.add_metric((entry.name, _GATEWAY), sum(waits.requests for waits in backlog))
        yield from (running, waiting, usage)

    def _successes(self) -> Family:
        success = CounterMetricFamily("vllm:request_success_total", "Requests answered.", labels=("model_name",))
        for sample in self._table.family(REQUESTS, name=REQUESTS.name, labels=REQUESTS.labels).samples:
            if sample.labels["outcome"] == "OK":
                success.add_metric((sample.labels["model"],), sample.value)
        return success
