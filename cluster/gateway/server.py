"""The gateway: gRPC in front, replicas behind. No ray, no torch; whoever runs it tells it where the replicas are."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.errors import ConfigError
from cluster.gateway.auth import Authenticator
from cluster.gateway.balancer import Balancer
from cluster.gateway.catalog import Catalog, CatalogEntry, ServedModel
from cluster.gateway.config import GatewayConfig
from cluster.gateway.generation_table import GenerationTable
from cluster.gateway.interceptors import AuthInterceptor, StatusInterceptor
from cluster.gateway.kserve.servicer import SERVICE as KSERVE_SERVICE
from cluster.gateway.kserve.servicer import KServeServicer
from cluster.gateway.listener import bind, check_exposure, create_server, is_loopback
from cluster.gateway.openai.server import HttpServer
from cluster.gateway.replica_link import ReplicaAddress
from cluster.gateway.request_path import RequestPath
from cluster.gateway.servicer import InferenceServicer
from cluster.gateway.tls import ServerTls
from cluster.kserve import open_inference_pb2_grpc
from cluster.observability.metrics import MetricSink, NullSink
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
        gateway_id: this gateway's name towards replicas; drawn if None.

    Attributes:
        http_port: where HTTP is served, from ``start`` on; None: it is turned off.
    """

    def __init__(
        self,
        config: GatewayConfig,
        models: Sequence[ServedModel],
        *,
        secret: str,
        metrics: MetricSink | None = None,
        gateway_id: str | None = None,
    ) -> None:
        metrics = metrics or NullSink()
        self.http_port: int | None = None
        self._config = config
        self._models = models
        self._secret = secret
        self._metrics = metrics
        self._gateway_id = gateway_id or f"gateway-{secrets.token_hex(4)}"
        self._catalog = Catalog(())
        self._table = GenerationTable(
            max_open=config.max_concurrent_streams, max_unread_tokens=config.max_unread_tokens, metrics=metrics
        )
        self._health = health.aio.HealthServicer()
        self._readiness_changed = asyncio.Event()
        self._tls: ServerTls | None = None
        self._authenticator: Authenticator
        self._server: grpc.aio.Server | None = None
        self._http: HttpServer | None = None
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Loads the tokenizers, binds and serves; the bound port.

        Raises:
            ConfigError: the address cannot be bound, or would be open to others without TLS; or a file of TLS or
                authentication cannot be used.
            CheckpointError: a tokenizer cannot be loaded.
        """
        check_exposure(self._config, self._config.host, field="gateway")
        self._tls = None if self._config.tls is None else ServerTls(self._config.tls)
        self._authenticator = Authenticator(self._config.auth)
        if not is_loopback(self._config.host) and self._tls is None:
            logger.warning("the gateway listens on %s without TLS, as gateway.insecure says", self._config.host)
        tokenizers = [await asyncio.to_thread(Tokenizer.from_checkpoint, model.checkpoint) for model in self._models]
        server = self._create_server()
        try:
            port = bind(server, self._config.host, self._config.port, self._tls, field="gateway")
        except ConfigError:
            await server.stop(grace=None)
            raise
        self._catalog = Catalog(
            CatalogEntry(
                model.name,
                tokenizer,
                Balancer(
                    model.name,
                    gateway_id=self._gateway_id,
                    secret=self._secret,
                    on_change=self._readiness_changed.set,
                    config=self._config.routing,
                ),
            )
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
            self._http = HttpServer(self._config, self._catalog, path)
            try:
                self.http_port = await self._http.start()
            except ConfigError:
                await server.stop(grace=None)
                raise
        await self._publish_health()
        await server.start()
        self._server = server
        self._health_task = asyncio.create_task(self._follow_readiness(), name="gateway-health")
        return port

    def set_replicas(self, model: str, replicas: Sequence[ReplicaAddress]) -> None:
        """The replicas of a model from now on: the whole list. Event loop only.

        Those no longer named get no new work; what runs there may finish.

        Raises:
            ModelNotFound: no such model.
        """
        self._catalog.lookup(model).balancer.set_replicas(replicas)

    @property
    def num_generations(self) -> int:
        """How many are open."""
        return len(self._table)

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new generations and waits for the running ones; False where some still ran after ``timeout_s``."""
        self._table.draining = True
        await self._health.enter_graceful_shutdown()
        try:
            await asyncio.wait_for(self._table.wait_empty(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Ends everything at once: open calls, replica streams, the port."""
        self._table.draining = True
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.wait([self._health_task])
        if self._http is not None:
            await self._http.stop()
        if self._server is not None:
            await self._server.stop(grace=None)
        await asyncio.gather(*(entry.balancer.close() for entry in self._catalog))

    # -- parts of start -----------------------------------------------------------------------------------------------

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
            await self._publish_health()

    async def _publish_health(self) -> None:
        status = health_pb2.HealthCheckResponse
        for service in ("", SERVICE):
            await self._health.set(service, status.SERVING if self._catalog.ready else status.NOT_SERVING)
