"""The port of the AdminService."""

from __future__ import annotations

import logging

from grpc_health.v1 import health, health_pb2_grpc

from cluster.errors import ConfigError
from cluster.gateway.admin_servicer import AdminServicer
from cluster.gateway.auth import Authenticator
from cluster.gateway.config import GatewayConfig
from cluster.gateway.interceptors import AuthInterceptor, StatusInterceptor
from cluster.gateway.listener import bind, check_exposure, create_server, is_loopback
from cluster.gateway.tls import ServerTls
from cluster.v1 import admin_pb2, admin_pb2_grpc

_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

logger = logging.getLogger(__name__)


class AdminServer:
    """Serves the AdminService, and the gateway's health for probes that cannot reach its own port."""

    def __init__(
        self,
        config: GatewayConfig,
        servicer: AdminServicer,
        health_servicer: health.aio.HealthServicer,
        tls: ServerTls | None,
        authenticator: Authenticator,
    ) -> None:
        self._config = config
        self._tls = tls
        self._authenticator = authenticator
        authentication = AuthInterceptor(
            authenticator,
            certificates=tls is not None and tls.is_mutual,
            open_services=[health.SERVICE_NAME],
            admins_only=True,
        )
        self._server = create_server(config, (authentication, StatusInterceptor(_SERVICE)))
        admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, self._server)

    async def start(self, gateway_port: int) -> int:
        """Binds and serves; the bound port.

        Raises:
            ConfigError: the address cannot be bound, or would be open to others.
        """
        host, port = self._config.admin.host, self._config.admin.port
        check_exposure(self._config, host, field="gateway.admin")
        if not is_loopback(host) and not self._authenticator.is_required and not self._config.insecure:
            raise ConfigError(
                f"whoever reaches {host} could stop the gateway: name administrators in gateway.auth, or leave "
                "gateway.admin.host at 127.0.0.1",
                field="gateway.admin.host",
            )
        bound = self._bind(host, gateway_port) if port is None else self._bind_to(host, port)
        await self._server.start()
        return bound

    async def stop(self) -> None:
        await self._server.stop(grace=None)

    def _bind(self, host: str, gateway_port: int) -> int:
        """Where nobody has chosen a port: the next one that is not for a gateway, if it is free."""
        port = gateway_port + self._config.replicas
        if self._config.port != 0 and port <= 65535:
            try:
                return self._bind_to(host, port)
            except ConfigError:
                logger.warning("port %d is taken: the AdminService gets another (gateway.admin.port)", port)
        return self._bind_to(host, 0)

    def _bind_to(self, host: str, port: int) -> int:
        return bind(self._server, host, port, self._tls, field="gateway.admin")
