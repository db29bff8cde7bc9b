"""The HTTP port: OpenAI's API, health and metrics, on the gateway's event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from cluster.errors import ConfigError
from cluster.gateway.auth import Authenticator
from cluster.gateway.caller import set_caller
from cluster.gateway.config import DEFAULT_HTTP_PORT, GatewayConfig
from cluster.gateway.metrics_page import MetricsPage
from cluster.gateway.openai.errors import HttpError, error_response
from cluster.gateway.openai.handlers import OpenAIHandlers
from cluster.gateway.tls import ServerTls, ssl_peer

logger = logging.getLogger(__name__)

_BACKLOG = 1024
_KEEPALIVE_S = 75.0
_HEALTH = "/health"

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpServer:
    """Serves HTTP beside gRPC.

    Args:
        config: where to listen; ``http_port`` is set.
        is_ready: whether requests can be served now.
        tls: None: no TLS.
    """

    def __init__(
        self,
        config: GatewayConfig,
        handlers: OpenAIHandlers,
        metrics: MetricsPage,
        *,
        is_ready: Callable[[], bool],
        authenticator: Authenticator,
        tls: ServerTls | None,
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._is_ready = is_ready
        self._authenticator = authenticator
        self._tls = tls
        app = web.Application(middlewares=[_map_errors, self._authenticate], client_max_size=config.max_message_bytes)
        app.add_routes([*handlers.routes(), web.get(_HEALTH, self._health), web.get("/metrics", self._show_metrics)])
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,  # who hangs up ends its generation
            # Also how long a new connection may take to send its first request.
            keepalive_timeout=min(_KEEPALIVE_S, config.connections.idle_timeout_s),
            max_field_size=config.connections.max_metadata_bytes,
            shutdown_timeout=0,  # what runs has been drained before
        )
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Binds and serves; the bound port.

        Raises:
            ConfigError: the address cannot be bound.
        """
        await self._runner.setup()
        host, port = self._config.host, self._config.http_port
        try:
            return await self._listen(host, port)
        except OSError as error:
            if port != DEFAULT_HTTP_PORT:
                raise ConfigError(
                    f"cannot listen for HTTP on {host}:{port}: {error.strerror or error}. Stop what listens there, or "
                    f"set gateway.http_port to another one (0 takes a free one, null turns HTTP off)",
                    field="gateway.http_port",
                ) from None
        # Nobody asked for this port, so it is no reason not to start.
        bound = await self._listen(host, 0)
        logger.warning("port %d is taken: HTTP is on port %d instead (gateway.http_port)", port, bound)
        return bound

    async def stop(self) -> None:
        """Closes the port and every connection."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()

    async def _listen(self, host: str, port: int) -> int:
        tls = self._tls
        self._server = await asyncio.get_running_loop().create_server(
            self._accept,
            host,
            port,
            backlog=_BACKLOG,
            reuse_address=True,
            ssl=None if tls is None else tls.ssl_context(),
            ssl_handshake_timeout=None if tls is None else self._config.connections.handshake_timeout_s,
        )
        return int(self._server.sockets[0].getsockname()[1])

    def _accept(self) -> asyncio.Protocol:
        server = self._runner.server
        if server is None or len(server.connections) >= self._config.connections.max_connections:
            return _Refused()
        return server()

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        # Probes have no credentials, and health tells nothing that a port does not.
        if request.path != _HEALTH:
            certificate = None if request.transport is None else request.transport.get_extra_info("peercert")
            authorization = {"authorization": request.headers.get("authorization", "")}
            set_caller(self._authenticator.authenticate(authorization, ssl_peer(certificate)))
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        """200 while every model has a replica that takes work and the gateway does, else 503."""
        return web.Response(status=200 if self._is_ready() else 503)

    async def _show_metrics(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics.render(request.headers.get("accept", ""))
        return web.Response(body=body, headers={"content-type": content_type})


class _Refused(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.abort()  # type: ignore[attr-defined]


@web.middleware
async def _map_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """The edge of every request: exceptions become answers in OpenAI's shape."""
    try:
        return await handler(request)
    except web.HTTPException as error:  # aiohttp's own: no such path, a method that is not there, a body too large
        allow = {"allow": error.headers["allow"]} if "allow" in error.headers else None
        message = f"{request.method} {request.path}: {error.reason}"
        return error_response(HttpError(error.status, message, headers=allow))
    except ConnectionError:
        raise  # nobody is left to tell
    except Exception as error:
        return error_response(error)
