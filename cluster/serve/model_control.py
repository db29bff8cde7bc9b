"""Starts and stops a model's replicas while the cluster runs, for the AdminService."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.exceptions import ExternalScalerDisabledError

from cluster.errors import EngineFault, Unsupported


class ServeModelControl:
    """Sets how many replicas a deployment has: none, or as many as are configured.

    Serve's dashboard uses the same call of its controller. It is not public, so its use is kept in this file, and a
    test of the real cluster guards it.

    Args:
        app_name: the Serve application of the deployments.
        deployments: the deployment's name by model.
        num_replicas: as configured, by model.
    """

    def __init__(self, app_name: str, deployments: Mapping[str, str], num_replicas: Mapping[str, int]) -> None:
        self._app_name = app_name
        self._deployments = deployments
        self._num_replicas = num_replicas

    async def load(self, model: str) -> None:
        """Raises what ``_scale`` does."""
        await self._scale(model, self._num_replicas[model])

    async def unload(self, model: str) -> None:
        """Raises what ``_scale`` does."""
        await self._scale(model, 0)

    async def _scale(self, model: str, num_replicas: int) -> None:
        """Returns when Serve's controller knows.

        Raises:
            Unsupported: the application was deployed without leave to do this.
            EngineFault: the controller does not answer, or is busy with a deployment.
        """
        deployment = DeploymentID(name=self._deployments[model], app_name=self._app_name)
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        try:
            await controller.update_deployment_replicas.remote(deployment, num_replicas)
        except ExternalScalerDisabledError as error:
            raise Unsupported(
                f"application {self._app_name!r} was deployed without external_scaler_enabled: true, so nobody may "
                "change its numbers of replicas"
            ) from error
        except RayError as error:
            raise EngineFault(f"Serve does not scale model {model!r}: {type(error).__name__}") from error
