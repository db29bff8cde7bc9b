"""The gateway: gRPC in front, replicas behind. No ray, no torch; whoever runs it tells it where the replicas are."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.core.config import ClassesConfig
from cluster.errors import Draining
from cluster.gateway.admin_server import AdminServer
from cluster.gateway.admin_servicer import AdminServicer, ModelControl
from cluster.gateway.admission import Admission
from cluster.gateway.auth import Authenticator
from cluster.gateway.balancer import Balancer
from cluster.gateway.catalog import Catalog, CatalogEntry, ServedModel
from cluster.gateway.config import GatewayConfig
from cluster.gateway.generation_table import GenerationTable
from cluster.gateway.interceptors import AuthInterceptor, StatusInterceptor
from cluster.gateway.kserve.servicer import SERVICE as KSERVE_SERVICE
from cluster.gateway.kserve.servicer import KServeServicer
from cluster.gateway.listener import bind, check_exposure, create_server, is_loopback
from cluster.gateway.metrics_page import MetricsPage
from cluster.gateway.openai.handlers import OpenAIHandlers
from cluster.gateway.openai.server import HttpServer
from cluster.gateway.replica_link import ReplicaAddress
from cluster.gateway.request_path import RequestPath
from cluster.gateway.servicer import InferenceServicer
from cluster.gateway.tenants import Tenants
from cluster.gateway.tls import ServerTls
from cluster.kserve import open_inference_pb2_grpc
from cluster.observability.metric_table import MetricTable, SinkPair
from cluster.observability.metrics import MetricSink
from cluster.text.tokenizer import Tokenizer
from cluster.v1 import inference_pb2_grpc
from cluster.wire import SERVICE

logger = logging.getLogger(__name__)


class Gateway:
    """Serves InferenceService, the Open Inference Protocol, OpenAI's API over HTTP, health and reflection.

    Health, under the service's name and under "": SERVING while every model has a ready replica, so whoever is sent
    here can use all that is listed here; NOT_SERVING otherwise, and for good once draining.

    Args:
        models: what is served; tokenizers are loaded by ``start``.
        secret: what replicas ask for.
        credentials: of TLS to the replicas; None: no TLS.
        classes: of priority; None: their defaults.
        gateway_id: this gateway's name towards replicas; drawn if None.
        model_control: starts and stops replicas for the AdminService; None: it cannot.
        configuration: what the AdminService tells of it, as plain types; None: the gateway's own part.

    Attributes:
        http_port: where HTTP is served, from ``start`` on; None: it is turned off.
        admin_port: where the AdminService is, from ``start`` on.
    """

    def __init__(
        self,
        config: GatewayConfig,
        models: Sequence[ServedModel],
        *,
        secret: str,
        credentials: grpc.ChannelCredentials | None = None,
        classes: ClassesConfig | None = None,
        metrics: MetricSink | None = None,
        gateway_id: str | None = None,
        model_control: ModelControl | None = None,
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        self._recorded = MetricTable()  # for /metrics
        metrics = self._recorded if metrics is None else SinkPair(metrics, self._recorded)
        self.http_port: int | None = None
        self.admin_port = 0
        self.gateway_id = gateway_id or f"gateway-{secrets.token_hex(4)}"
        self._config = config
        self._classes = classes or ClassesConfig()
        self._models = models
        self._secret = secret
        self._credentials = credentials
        self._metrics = metrics
        self._catalog = Catalog(())
        self._table = GenerationTable(max_open=config.max_concurrent_streams, replay=config.replay, metrics=metrics)
        self._health = health.aio.HealthServicer()
        self._stopping = False
        self._model_control = model_control
        self._configuration = configuration
        self._readiness_changed = asyncio.Event()
        self._serving = asyncio.Event()
        self._tls: ServerTls | None = None
        self._authenticator: Authenticator
        self._server: grpc.aio.Server | None = None
        self._http: HttpServer | None = None
        self._admin: AdminServer | None = None
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Loads the tokenizers, binds and serves; the bound port.

        Raises:
            ConfigError: the address cannot be bound, or would be open to others without TLS; or a file of TLS or
                authentication cannot be used.
            CheckpointError: a tokenizer cannot be loaded.
        """
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> int:
        check_exposure(self._config, self._config.host, field="gateway")
        self._tls = None if self._config.tls is None else ServerTls(self._config.tls)
        self._authenticator = Authenticator(self._config.auth)
        if not is_loopback(self._config.host) and self._tls is None:
            logger.warning("the gateway listens on %s without TLS, as gateway.insecure says", self._config.host)
        tokenizers = [await asyncio.to_thread(Tokenizer.from_checkpoint, model.checkpoint) for model in self._models]
        self._server = server = self._create_server()
        port = bind(server, self._config.host, self._config.port, self._tls, field="gateway")
        tenants = Tenants(self._config.tenants, self._num_gateways)
        self._catalog = Catalog(
            self._create_entry(model.name, tokenizer, tenants)
            for model, tokenizer in zip(self._models, tokenizers, strict=True)
        )
        path = RequestPath(self._config, self._catalog, self._table, self._metrics)
        servicer = InferenceServicer(self._config, self._catalog, self._table, path)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        kserve = KServeServicer(self._catalog, self._table, path)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(kserve, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._reflects:
            services = (SERVICE, KSERVE_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(services, server)
        if self._config.http_port is not None:
            self._http = HttpServer(
                self._config,
                OpenAIHandlers(self._catalog, path),
                MetricsPage(self._catalog, self._recorded),
                is_ready=lambda: self._catalog.ready and not self._table.draining,
                authenticator=self._authenticator,
                tls=self._tls,
            )
            self.http_port = await self._http.start()
        await self.publish_health()
        configuration = (
            {"gateway": dataclasses.asdict(self._config)} if self._configuration is None else self._configuration
        )
        admin_servicer = AdminServicer(self, self._catalog, configuration, self._model_control)
        self._admin = AdminServer(self._config, admin_servicer, self._health, self._tls, self._authenticator)
        self.admin_port = await self._admin.start(port)
        await server.start()
        self._health_task = asyncio.create_task(self._follow_readiness(), name="gateway-health")
        return port

    def set_replicas(self, model: str, replicas: Sequence[ReplicaAddress]) -> None:
        """The replicas of a model from now on: the whole list. Event loop only.

        Those no longer named get no new work; what runs there may finish.

        Raises:
            ModelNotFound: no such model.
        """
        self._catalog.lookup(model).balancer.set_replicas(replicas)

    async def wait_serving(self) -> None:
        """Returns when every model has a ready replica."""
        await self._serving.wait()

    @property
    def num_generations(self) -> int:
        """How many are open."""
        return len(self._table)

    @property
    def draining(self) -> bool:
        """Whether new generations are refused."""
        return self._table.draining

    async def set_draining(self, draining: bool) -> None:
        """Takes the gateway out of service, or back into it: for an operator.

        Raises:
            Draining: it is shutting down.
        """
        if self._stopping:
            raise Draining("the gateway is shutting down, for good")
        self._table.draining = draining
        await self.publish_health()

    async def drain(self, timeout_s: float) -> bool:
        """As ``wait_idle``, for good: no new generations are taken from now on."""
        self._stopping = self._table.draining = True
        await self._health.enter_graceful_shutdown()
        return await self.wait_idle(timeout_s)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no generation is open; False where some still were after ``timeout_s``."""
        try:
            await asyncio.wait_for(self._table.wait_empty(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Ends everything at once: open calls, replica streams, the port."""
        self._stopping = self._table.draining = True
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.wait([self._health_task])
        if self._http is not None:
            await self._http.stop()
        if self._admin is not None:
            await self._admin.stop()
        if self._server is not None:
            await self._server.stop(grace=None)
        await asyncio.gather(*(entry.balancer.close() for entry in self._catalog))

    # -- parts of start -----------------------------------------------------------------------------------------------

    def _create_entry(self, model: str, tokenizer: Tokenizer, tenants: Tenants) -> CatalogEntry:
        balancer = Balancer(
            model,
            gateway_id=self.gateway_id,
            secret=self._secret,
            credentials=self._credentials,
            on_change=self._readiness_changed.set,
            config=self._config.routing,
        )
        admission = Admission(model, self._config.admission, self._classes, balancer, tenants)
        return CatalogEntry(model, tokenizer, balancer, admission)

    def _num_gateways(self) -> int:
        return max((entry.balancer.num_gateways for entry in self._catalog), default=1)

    def _create_server(self) -> grpc.aio.Server:
        # Probes have no credentials, and health tells nothing that a port does not.
        authentication = AuthInterceptor(
            self._authenticator,
            certificates=self._tls is not None and self._tls.is_mutual,
            open_services=[health.SERVICE_NAME],
        )
        return create_server(self._config, (authentication, StatusInterceptor(SERVICE, KSERVE_SERVICE)))

    @property
    def _reflects(self) -> bool:
        return is_loopback(self._config.host) if self._config.reflection is None else self._config.reflection

    # -- health -------------------------------------------------------------------------------------------------------

    async def _follow_readiness(self) -> None:
        while True:
            await self._readiness_changed.wait()
            self._readiness_changed.clear()
            await self.publish_health()

    async def publish_health(self) -> None:
        """Tells who watches whether requests are taken here."""
        status = health_pb2.HealthCheckResponse
        is_serving = self._catalog.ready and not self._table.draining
        self._serving.set() if is_serving else self._serving.clear()
        for service in ("", SERVICE):
            await self._health.set(service, status.SERVING if is_serving else status.NOT_SERVING)
