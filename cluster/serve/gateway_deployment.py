"""The Serve deployment that clients connect to: the gateway in a process of its own, without torch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.checkpoint import resolve_checkpoint
from cluster.core.config import ClassesConfig
from cluster.gateway.catalog import ServedModel
from cluster.gateway.config import GatewayConfig
from cluster.gateway.server import Gateway
from cluster.observability.logging import configure_logging
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
        report = StartupReport(identity.start_id, "gateway", context.replica_id.unique_id)
        try:
            report.enter("loading tokenizers")
            served = [
                ServedModel(name, await asyncio.to_thread(resolve_checkpoint, path, weights=False))
                for name, path in paths.items()
            ]
            deployments = {name: handle.deployment_name for name, handle in models.items()}
            self._gateway = Gateway(
                config,
                served,
                classes=classes,
                secret=identity.secret,
                credentials=identity.certificate and identity.certificate.channel_credentials(),
                metrics=RaySink(),
                gateway_id=f"gateway-{context.replica_id.unique_id}",
                model_control=ServeModelControl(context.app_name, deployments, num_replicas),
                configuration=configuration,
            )
            port = await self._gateway.start()
            self._directory = ReplicaDirectory(
                deployments,
                app_name=context.app_name,
                on_change=self._gateway.set_replicas,
            )
        except BaseException as error:
            report.fail(error)
            if self._gateway:
                await self._gateway.stop()
            raise
        report.finish(node_ip=ray.util.get_node_ip_address(), port=port, admin_port=self._gateway.admin_port)

    async def check_health(self) -> None:
        """That this runs shows that the event loop lives, and with it the gateway."""

    async def __del__(self) -> None:
        # Serve calls this once, before the process ends, and Python where construction failed.
        if self._gateway is None or self._directory is None:
            return
        self._directory.stop()
        if not await self._gateway.drain(self._config.drain_timeout_s):
            logger.warning("the gateway stops with %d generations running", self._gateway.num_generations)
        await self._gateway.stop()
