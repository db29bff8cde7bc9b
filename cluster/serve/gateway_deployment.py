"""The Serve deployment that clients connect to: the gateway in a process of its own, without torch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.checkpoint import resolve_checkpoint
from cluster.core.config import ClassesConfig
from cluster.errors import ConfigError
from cluster.gateway.catalog import ServedModel
from cluster.gateway.config import GatewayConfig
from cluster.gateway.server import Gateway
from cluster.observability.logging import configure_logging
from cluster.serve.addresses import join_host_port, reachable_host
from cluster.serve.gateway_ports import PORT_FIELDS, at_place, is_free
from cluster.serve.identity import ClusterIdentity
from cluster.serve.model_control import ServeModelControl
from cluster.serve.ray_metrics import RaySink
from cluster.serve.replica_directory import ReplicaDirectory
from cluster.serve.startup_report import StartupReport

logger = logging.getLogger(__name__)


class GatewayDeployment:
    """Runs ``cluster.gateway.Gateway`` under Serve's supervision.

    Args:
        config: where to listen.
        classes: of priority, the same for all models.
        paths: checkpoint by model name.
        models: the deployment that serves each model.
        num_replicas: as configured, by model.
        configuration: of the whole cluster, for the AdminService to tell.
    """

    _gateway: Gateway | None = None
    _directory: ReplicaDirectory | None = None  # from when it serves
    _connecting: asyncio.Task[None] | None = None

    async def __init__(  # type: ignore[misc]
        self,
        config: GatewayConfig,
        classes: ClassesConfig,
        paths: Mapping[str, str],
        models: Mapping[str, DeploymentHandle],
        num_replicas: Mapping[str, int],
        identity: ClusterIdentity,
        *,
        configuration: Mapping[str, Any],
    ) -> None:
        configure_logging(identity.logging.level, identity.logging.format)
        context = serve.get_replica_context()
        self._config = config
        replica_id = context.replica_id.unique_id
        title = "gateway" if config.replicas == 1 else f"gateway {replica_id}"
        report = StartupReport(identity.start_id, title, replica_id)
        deployments = {name: handle.deployment_name for name, handle in models.items()}
        try:
            report.enter("loading tokenizers")
            served = [
                ServedModel(name, await asyncio.to_thread(resolve_checkpoint, path, weights=False))
                for name, path in paths.items()
            ]
            self._port = await self._start(
                served,
                classes=classes,
                secret=identity.secret,
                credentials=identity.certificate and identity.certificate.channel_credentials(),
                metrics=RaySink(),
                gateway_id=f"gateway-{replica_id}",
                model_control=ServeModelControl(context.app_name, deployments, num_replicas),
                configuration=configuration,
            )
            self._directory = ReplicaDirectory(
                deployments, app_name=context.app_name, on_change=self._gateway.set_replicas
            )
        except BaseException as error:
            report.fail(error)
            if self._gateway:
                await self._gateway.stop()
            raise
        self._connecting = asyncio.create_task(self._report_serving(report))

    async def _start(self, served: Sequence[ServedModel], **options: Any) -> int:
        """Starts the gateway on the first free ports of those that are for gateways; the gRPC port.

        Raises:
            ClusterError: it cannot be.
        """
        last = self._config.replicas - 1 if self._config.port else 0
        for place in range(last + 1):
            config = at_place(self._config, place)
            if place < last and not is_free(config.host, config.port):
                continue
            self._gateway = Gateway(config, served, **options)
            try:
                return await self._gateway.start()
            except ConfigError as error:
                # Another gateway of this node may have been faster.
                if place == last or error.field not in PORT_FIELDS:
                    raise
        raise AssertionError("the last place returns or raises")

    async def _report_serving(self, report: StartupReport) -> None:
        """Whoever waits for the start hears of the gateway when requests can be sent to it."""
        report.enter("connecting to replicas")
        await self._gateway.wait_serving()
        node_ip = ray.util.get_node_ip_address()
        http_port = self._gateway.http_port or 0
        report.finish(node_ip=node_ip, port=self._port, admin_port=self._gateway.admin_port, http_port=http_port)

    def record_replica_metadata(self) -> dict[str, str]:
        """Where clients find this gateway, for whoever asks Serve's controller."""
        host = reachable_host(self._config.host, ray.util.get_node_ip_address())
        return {"address": join_host_port(host, self._port)}

    async def check_health(self) -> None:
        """That this runs shows that the event loop lives, and with it the gateway."""

    async def __del__(self) -> None:
        # Serve calls this once, before the process ends, and Python where construction failed.
        if self._gateway is None or self._directory is None or self._connecting is None:
            return
        self._connecting.cancel()
        self._directory.stop()
        if not await self._gateway.drain(self._config.drain_timeout_s):
            logger.warning("the gateway stops with %d generations running", self._gateway.num_generations)
        await self._gateway.stop()
