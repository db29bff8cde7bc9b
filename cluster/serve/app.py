"""The one wiring file: the configuration tree becomes a running cluster, or an application for Serve to run."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import ClusterConfig, parse_config
from cluster.errors import ConfigError, EngineFault
from cluster.serve.local_ray import ACTOR_ENVIRONMENT, LOCAL_ADDRESS, LocalRay, quieten
from cluster.serve.placement import LOCAL_GATEWAY_CPUS, Resources, place_anywhere, place_locally
from cluster.serve.preflight import check_machine

if TYPE_CHECKING:
    from ray.serve import Application

    from cluster.serve.startup_report import StartupState

logger = logging.getLogger(__name__)

# Ray is imported where it is first needed: a wrong path or port is told before that second has passed.

APP_NAME = "cluster"
_POLL_S = 0.1
_STATUS_POLL_S = 1.0
_CONNECT_TIMEOUT_S = 30.0
_STOP_MARGIN_S = 15.0


def build(args: dict[str, Any]) -> Application:
    """The application for a cluster that exists, as a Serve config file names it; ``args["config"]`` is the tree.

    Raises:
        ConfigError: the tree is wrong.
    """
    from cluster.serve.application import create_application

    config = parse_config(args["config"])
    return create_application(
        config,
        place_anywhere(config.models, None),
        start_id=secrets.token_hex(8),
        gateway_cpus=1,
        environment=ACTOR_ENVIRONMENT,
    )


class Cluster:
    """A cluster run from this process: on a Ray of its own, or inside one that runs already.

    ``start`` and ``stop`` belong on the main thread. After ``start``:

    Attributes:
        address: ``"host:port"`` of the gateway.
        dashboard_url: of a Ray of our own; None without a dashboard, or where Ray was there before.
        replicas: what each replica told of itself: model, dtype, device, kv_capacity_tokens, ...
        notes: what turned out differently from what was asked.
    """

    def __init__(self, config: ClusterConfig, on_progress: Callable[[Sequence[StartupState]], None]) -> None:
        """``on_progress`` gets the whole state of the start-up a few times a second."""
        self._config = config
        self._on_progress = on_progress
        self._start_id = secrets.token_hex(8)
        self._ray = LocalRay(config.ray) if config.ray.address == "local" else None
        self._connected = False
        self._own: StartupState
        self.address = ""
        self.replicas: list[dict[str, str | int]] = []

    @property
    def dashboard_url(self) -> str | None:
        return self._ray.dashboard_url if self._ray else None

    @property
    def notes(self) -> list[str]:
        return self._ray.notes if self._ray else []

    def start(self) -> None:
        """Returns when every replica is ready and the gateway serves; leaves nothing behind if that fails.

        Raises:
            ClusterError: why it cannot be; ConfigError and CheckpointError say what to change.
        """
        if self._ray:
            check_machine(self._config)
        try:
            self._start()
        except BaseException:
            self.stop(hurry=lambda: True)
            raise

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Drains gateway and replicas, then ends all that ``start`` made. Idempotent.

        Args:
            hurry: asked now and then; once it says yes, what still runs is not waited for.
        """
        import ray

        if self._connected and not (self._ray and hurry()):
            self._drain(hurry)
        self._connected = False
        if self._ray:
            self._ray.stop()
        else:
            ray.shutdown()

    def _start(self) -> None:
        from cluster.serve.startup_report import StartupState

        self._own = StartupState(actor="cluster")
        self._enter("starting Ray")
        if self._ray:
            self._ray.start()
        else:
            self._join()
        import ray
        from ray import serve

        from cluster.serve.application import create_application

        quieten()
        self._enter("starting Serve")
        self._connected = True
        resources = ray.cluster_resources()
        available = Resources(num_cpus=resources.get("CPU", 0.0), num_gpus=resources.get("GPU", 0.0))
        if self._ray:
            placements, gateway_cpus = place_locally(self._config.models, available), LOCAL_GATEWAY_CPUS
        else:
            placements, gateway_cpus = place_anywhere(self._config.models, available), 1.0
        serve.start(proxy_location="Disabled")
        self._enter("starting gateway and replicas")
        application = create_application(
            self._config,
            placements,
            start_id=self._start_id,
            gateway_cpus=gateway_cpus,
            replica_host=LOCAL_ADDRESS if self._ray else None,
            environment=None if self._ray else ACTOR_ENVIRONMENT,
        )
        serve.run_many(
            [serve.RunTarget(application, name=APP_NAME, route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        self._await_ready()
        self._enter("connecting the gateway to its replicas")
        _await_serving(self.address)
        self._finish()

    def _join(self) -> None:
        import ray

        address = self._config.ray.address
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except Exception as error:  # Ray has no common class for these
            raise ConfigError(
                f"no Ray to join at {address!r}: {' '.join(str(error).split())}", field="ray.address"
            ) from error

    # -- progress -----------------------------------------------------------------------------------------------------

    def _enter(self, stage: str) -> None:
        self._own.stages.append((stage, time.time()))
        self._on_progress([self._own])

    def _finish(self) -> None:
        from dataclasses import replace

        self._own = replace(self._own, ended_at=time.time())
        self._on_progress([self._own])

    def _await_ready(self) -> None:
        from cluster.serve.startup_report import forget_startup, read_startup

        began = time.monotonic()
        checked = began
        while True:
            states = list(read_startup(self._start_id).values())
            self._on_progress([self._own, *states])
            for state in states:
                state.raise_error()
            ready = [state.facts for state in states if state.ready]
            self.replicas = [facts for facts in ready if "model" in facts]
            ports = [facts["port"] for facts in ready if "port" in facts]
            missing = [
                model
                for model in self._config.models
                if sum(facts["model"] == model.name for facts in self.replicas) < model.replicas
            ]
            if ports and not missing:
                self.address = f"{self._config.gateway.host}:{ports[0]}"
                forget_startup(self._start_id)
                return
            now = time.monotonic()
            for model in missing:
                if now - began > model.startup_timeout_s:
                    raise EngineFault(
                        f"model {model.name!r} was not ready after {model.startup_timeout_s:g} s (startup_timeout_s)"
                    )
            if now - checked > _STATUS_POLL_S:
                checked = now
                self._check_status()
            time.sleep(_POLL_S)

    def _check_status(self) -> None:
        """A process that was killed reports nothing itself; Serve tells."""
        from ray import serve

        application = serve.status().applications.get(APP_NAME)
        if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
            raise EngineFault("gateway or replicas did not start: " + " ".join(" ".join(messages).split())[:1000])

    def _drain(self, hurry: Callable[[], bool]) -> None:
        """Has Serve stop gateway and replicas, each of which drains first. Gives up with a Ray that is gone: what
        sends SIGTERM to all of a service's processes takes it from under us.
        """
        drains = [self._config.gateway.drain_timeout_s, *(model.drain_timeout_s for model in self._config.models)]
        deadline = time.monotonic() + max(drains) + _STOP_MARGIN_S
        # Calls into Ray have no way to be given up; a thread can be left alone with them.
        thread = threading.Thread(target=_delete_application, name="drain", daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() < deadline and not hurry():
            if self._ray and not self._ray.alive:
                return
            thread.join(_POLL_S)


def _delete_application() -> None:
    from ray import serve
    from ray.exceptions import RayError

    try:
        serve.delete(APP_NAME, _blocking=False)
        while APP_NAME in serve.status().applications:
            time.sleep(_POLL_S)
    except RayError as error:
        logger.warning("the cluster could not be drained: %s", error)


def _await_serving(address: str) -> None:
    """Waits until the gateway's health says that every model has a replica."""
    with grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=_CONNECT_TIMEOUT_S, wait_for_ready=True
        )
        try:
            for response in watch:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    watch.cancel()
                    return
        except grpc.RpcError as error:
            raise EngineFault(f"the gateway at {address} did not reach its replicas: {error.code().name}") from None
