"""Where the replicas are: Serve's controller pushes every change of a deployment's running replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial

import ray
from ray.serve._private.common import DeploymentID, DeploymentTargetInfo
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace

from cluster.gateway.replica_link import ReplicaAddress

SetReplicas = Callable[[str, list[ReplicaAddress]], None]


class ReplicaDirectory:
    """Follows the deployments of the served models. Lives on the event loop that it is made on.

    Serve's handles use the same push, the one way to learn of a change at once; it is not public, so its use is kept
    in this file, and a test of the real cluster guards it.

    Args:
        deployments: the deployment's name by model.
        app_name: the Serve application that they belong to.
        on_change: gets a model and all its running replicas.
    """

    def __init__(self, deployments: Mapping[str, str], *, app_name: str, on_change: SetReplicas) -> None:
        self._on_change = on_change
        self._client = LongPollClient(
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE),
            {
                (LongPollNamespace.DEPLOYMENT_TARGETS, DeploymentID(name=name, app_name=app_name)): partial(
                    self._publish, model
                )
                for model, name in deployments.items()
            },
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"gateway:{ray.get_runtime_context().get_actor_id()}",
        )

    def stop(self) -> None:
        self._client.stop()

    def _publish(self, model: str, targets: DeploymentTargetInfo) -> None:
        self._on_change(
            model,
            [
                ReplicaAddress(info.replica_id.unique_id, info.replica_metadata["address"])
                for info in targets.running_replicas
            ],
        )
