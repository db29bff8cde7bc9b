"""The HTTP port: OpenAI's API, health and metrics, on the gateway's event loop."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from cluster.errors import ConfigError
from cluster.gateway.catalog import Catalog
from cluster.gateway.config import DEFAULT_HTTP_PORT, GatewayConfig
from cluster.gateway.openai.errors import HttpError, error_response
from cluster.gateway.openai.handlers import OpenAIHandlers
from cluster.gateway.request_path import RequestPath

logger = logging.getLogger(__name__)

_BACKLOG = 1024
_KEEPALIVE_S = 75.0


class HttpServer:
    """Serves HTTP beside gRPC.

    Args:
        config: where to listen; ``http_port`` is set.
        path: what every protocol's requests go through.
    """

    def __init__(self, config: GatewayConfig, catalog: Catalog, path: RequestPath) -> None:
        self._config = config
        app = web.Application(middlewares=[_map_errors], client_max_size=config.max_message_bytes)
        app.add_routes(OpenAIHandlers(catalog, path).routes())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,  # who hangs up ends its generation
            keepalive_timeout=_KEEPALIVE_S,
            shutdown_timeout=0,  # what runs has been drained before
        )

    async def start(self) -> int:
        """Binds and serves; the bound port.

        Raises:
            ConfigError: the address cannot be bound.
        """
        await self._runner.setup()
        host, port = self._config.host, self._config.http_port
        try:
            await self._listen(host, port)
        except OSError as error:
            if port != DEFAULT_HTTP_PORT:
                await self._runner.cleanup()
                raise ConfigError(
                    f"cannot listen for HTTP on {host}:{port}: {error.strerror or error}. Stop what listens there, or "
                    f"set gateway.http_port to another one (0 takes a free one, null turns HTTP off)",
                    field="gateway.http_port",
                ) from None
            # Nobody asked for this port, so it is no reason not to start.
            await self._listen(host, 0)
            logger.warning("port %d is taken: HTTP is on port %d instead (gateway.http_port)", port, self._port)
        return self._port

    async def stop(self) -> None:
        """Closes the port and every connection."""
        await self._runner.cleanup()

    async def _listen(self, host: str, port: int) -> None:
        site = web.TCPSite(self._runner, host, port, backlog=_BACKLOG, reuse_address=True)
        try:
            await site.start()
        except OSError:
            await site.stop()
            raise

    @property
    def _port(self) -> int:
        return int(self._runner.addresses[0][1])


@web.middleware
async def _map_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """The edge of every request: exceptions become answers in OpenAI's shape."""
    try:
        return await handler(request)
    except web.HTTPException as error:  # aiohttp's own: no such path, a method that is not there, a body too large
        allow = {"allow": error.headers["allow"]} if "allow" in error.headers else None
        return error_response(
            HttpError(error.status, f"{request.method} {request.path}: {error.reason}", headers=allow)
        )
    except ConnectionError:
        raise  # nobody is left to tell
    except Exception as error:
        return error_response(error)
