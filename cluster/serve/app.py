"""The one wiring file: the configuration tree becomes a running cluster, or an application for Serve to run."""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig, parse_config
from cluster.errors import ConfigError, EngineFault
from cluster.gateway.config import DEFAULT_HTTP_PORT
from cluster.serve.addresses import gateway_address, with_ports
from cluster.serve.local_ray import (
    ACTOR_ENVIRONMENT,
    LOCAL_ADDRESS,
    LocalRay,
    quieten,
    signals_deferred,
    stop_error_printer,
)
from cluster.serve.placement import LOCAL_GATEWAY_CPUS, place_anywhere, place_locally
from cluster.serve.preflight import check_machine
from cluster.serve.startup_state import StartupState

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.serve import Application

logger = logging.getLogger(__name__)

# Ray is imported where it is first needed: a wrong path or port is told before that second has passed.

APP_NAME = "cluster"
_POLL_S = 0.1
_STATUS_POLL_S = 1.0
_CONNECT_TIMEOUT_S = 30.0
_STOP_MARGIN_S = 15.0
_GIVE_UP_S = 1.0


def build(args: dict[str, Any]) -> Application:
    """The application for a cluster that exists, as a Serve config file names it; ``args["config"]`` is the tree.

    Raises:
        ConfigError: the tree is wrong.
    """
    from cluster.serve.application import create_application
    from cluster.serve.auto_parallel import decide_models, is_open
    from cluster.serve.ray_nodes import alive_nodes

    config = parse_config(args["config"])
    # Without need Ray is not asked: an application can be built, and looked at, where none runs.
    models, reasons = decide_models(config.models, alive_nodes() if any(map(is_open, config.models)) else ())
    for reason in reasons:
        logger.info(reason)
    return create_application(
        config,
        place_anywhere(models, None),
        start_id=None,
        gateway_cpus=1,
        environment=ACTOR_ENVIRONMENT,
    )


class Cluster:
    """A cluster run from this process: on a Ray of its own, or inside one that runs already.

    ``start`` and ``stop`` belong on the main thread. After ``start``:

    Attributes:
        address: ``"host:port"`` of the gateway; of several, all with commas.
        http_urls: of each gateway, such as ``"http://127.0.0.1:8000"``; none where HTTP is turned off.
        dashboard_url: of a Ray of our own; None without a dashboard, or where Ray was there before.
        replicas: what each replica told of itself: model, dtype, device, kv_capacity_tokens, ...
        notes: what turned out differently from what was asked, and what was decided where that was left open.
    """

    def __init__(self, config: ClusterConfig, on_progress: Callable[[Sequence[StartupState]], None]) -> None:
        """``on_progress`` gets the whole state of the start-up a few times a second."""
        self._config = config
        self._on_progress = on_progress
        self._start_id = secrets.token_hex(8)
        self._ray = LocalRay(config.ray) if config.ray.address == "local" else None
        self._own = StartupState(actor="cluster")
        self._deployed = False
        self._owns_serve = False
        self._reasons: list[str] = []
        self._wants_default_http = config.gateway.http_port == DEFAULT_HTTP_PORT
        self.address = ""
        self.http_urls: list[str] = []
        self.replicas: list[dict[str, str | int]] = []

    @property
    def dashboard_url(self) -> str | None:
        return self._ray.dashboard_url if self._ray else None

    @property
    def notes(self) -> list[str]:
        return [*(self._ray.notes if self._ray else []), *self._reasons]

    def start(self) -> None:
        """Returns when every replica is ready and the gateway serves; leaves nothing behind if that fails.

        Raises:
            ClusterError: why it cannot be; ConfigError and CheckpointError say what to change.
        """
        if self._ray:
            check_machine(self._config, self._enter)
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

        if self._ray:
            if self._deployed and self._ray.alive and not hurry():
                self._drain(hurry)
            self._ray.stop()
        else:
            if self._deployed or self._owns_serve:
                self._drain(hurry)
            ray.shutdown()
        self._deployed = self._owns_serve = False

    def check(self) -> None:
        """Raises EngineFault where a Ray of our own has ended under us."""
        if self._ray and not self._ray.alive:
            raise EngineFault(
                "Ray has ended, and the gateway and the replicas with it: it was killed, or ran out of memory"
            )

    def _start(self) -> None:
        self._enter("starting Ray")
        with signals_deferred():  # half an import would be in the way of what ends the start
            import ray  # noqa: F401
        if self._ray:
            self._ray.start()
        else:
            self._join()
        from ray import serve

        from cluster.serve.application import create_application
        from cluster.serve.auto_parallel import decide_models
        from cluster.serve.ray_nodes import alive_nodes
        from cluster.serve.startup_report import await_startup

        quieten()
        self._enter("starting Serve")
        nodes = alive_nodes()
        models, reasons = decide_models(self._config.models, nodes)
        self._reasons += reasons
        resources = [node.resources for node in nodes]
        num_gateways = self._config.gateway.replicas
        if self._ray:
            placements = place_locally(models, resources[0])
            gateway_cpus = int(LOCAL_GATEWAY_CPUS / num_gateways * 1e4) / 1e4  # as Ray can count
            self._config = replace(self._config, gateway=with_ports(self._config.gateway))
        else:
            self._find_serve()
            placements = place_anywhere(models, resources, num_gateways=num_gateways)
            gateway_cpus = 1.0
        serve.start(proxy_location="Disabled")
        self._enter("starting gateway and replicas")
        await_startup(self._start_id)
        application = create_application(
            self._config,
            placements,
            start_id=self._start_id,
            gateway_cpus=gateway_cpus,
            replica_host=LOCAL_ADDRESS if self._ray else None,
            environment=None if self._ray else ACTOR_ENVIRONMENT,
        )
        self._deployed = True
        serve.run_many(
            [serve.RunTarget(application, name=APP_NAME, route_prefix=None, external_scaler_enabled=True)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        self._await_ready()
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
        stop_error_printer()

    def _find_serve(self) -> None:
        """Serve may run on that Ray already; its applications are not ours to replace."""
        from ray import serve

        try:
            _serve_controller()
        except ValueError:
            self._owns_serve = True
            return
        if APP_NAME in serve.status().applications:
            raise ConfigError(
                f"a cluster runs on that Ray already (Serve's application {APP_NAME!r}): stop it, or use another Ray",
                field="ray.address",
            )

    # -- progress -----------------------------------------------------------------------------------------------------

    def _enter(self, stage: str) -> None:
        self._own.stages.append((stage, time.time()))
        self._on_progress([self._own])

    def _finish(self) -> None:
        self._own = replace(self._own, ended_at=time.time())
        self._on_progress([self._own])

    def _await_ready(self) -> None:
        import ray

        from cluster.serve.startup_report import forget_startup, read_startup

        began = time.monotonic()
        checked = began
        connected = math.inf  # from when every replica was there
        while True:
            states = list(read_startup(self._start_id).values())
            self._on_progress([self._own, *states])
            for state in states:
                state.raise_error()
            ready = [state.facts for state in states if state.ready]
            self.replicas = [facts for facts in ready if "model" in facts]
            gateways = [facts for facts in ready if "node_ip" in facts]
            missing = [
                model
                for model in self._config.models
                if sum(facts["model"] == model.name for facts in self.replicas) < model.replicas
            ]
            if len(gateways) >= self._config.gateway.replicas and not missing:
                own_ip = ray.util.get_node_ip_address()
                self.address = ",".join(sorted(self._address_of(gateway, "port", own_ip) for gateway in gateways))
                self._find_http(gateways, own_ip)
                forget_startup(self._start_id)
                return
            now = time.monotonic()
            for model in missing:
                if now - began > model.startup_timeout_s:
                    raise EngineFault(
                        f"model {model.name!r} was not ready after {model.startup_timeout_s:g} s (startup_timeout_s)"
                    )
            connected = connected if missing else min(connected, now)
            if now - connected > _CONNECT_TIMEOUT_S:
                raise EngineFault(f"the gateways did not reach their replicas within {_CONNECT_TIMEOUT_S:g} s")
            if now - checked > _STATUS_POLL_S:
                checked = now
                self._check_status()
            time.sleep(_POLL_S)

    def _address_of(self, gateway: dict[str, str | int], port: str, own_ip: str) -> str:
        return gateway_address(
            self._config.gateway.host, int(gateway[port]), node_ip=str(gateway["node_ip"]), own_ip=own_ip
        )

    def _find_http(self, gateways: Sequence[dict[str, str | int]], own_ip: str) -> None:
        serving = [gateway for gateway in gateways if gateway["http_port"]]
        scheme = "http" if self._config.gateway.tls is None else "https"
        self.http_urls = sorted(f"{scheme}://{self._address_of(gateway, 'http_port', own_ip)}" for gateway in serving)
        if self._wants_default_http and not any(gateway["http_port"] == DEFAULT_HTTP_PORT for gateway in serving):
            self._reasons.append(
                f"port {DEFAULT_HTTP_PORT} is taken: HTTP is at {', '.join(self.http_urls)} instead (gateway.http_port)"
            )

    def _check_status(self) -> None:
        """A process that was killed reports nothing itself; Serve tells."""
        from ray import serve

        application = serve.status().applications.get(APP_NAME)
        if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
            raise EngineFault("gateway or replicas did not start: " + " ".join(" ".join(messages).split())[:1000])

    def _drain(self, hurry: Callable[[], bool]) -> None:
        """Has Serve stop gateway and replicas, each of which drains first. Gives up with a Ray that is gone: what
        sends SIGTERM to all of a service's processes takes it from under us. On a Ray that stays, haste waits until
        Serve has been told: what it then stops without us must not be left running.
        """
        drains = [self._config.gateway.drain_timeout_s, *(model.drain_timeout_s for model in self._config.models)]
        deadline = time.monotonic() + max(drains) + _STOP_MARGIN_S
        told, given_up = threading.Event(), threading.Event()
        # Calls into Ray have no way to be given up; a thread can be left alone with them.
        thread = threading.Thread(target=self._delete, args=(told, given_up), name="drain", daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() < deadline:
            if self._ray and not self._ray.alive:
                break
            if (self._ray or told.is_set()) and hurry():
                break
            thread.join(_POLL_S)
        given_up.set()
        thread.join(_GIVE_UP_S)

    def _delete(self, told: threading.Event, given_up: threading.Event) -> None:
        """Once it is given up, Ray is called no more: a call after its shutdown would start it anew."""
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        from cluster.serve.startup_report import forget_startup

        try:
            forget_startup(self._start_id)
            if self._owns_serve and serve.status().applications.keys() <= {APP_NAME}:
                _end_serve(told, given_up)
                return
            serve.delete(APP_NAME, _blocking=False)
            while APP_NAME in serve.status().applications:  # its answer shows that the order before it has arrived
                told.set()
                if given_up.wait(_POLL_S):
                    return
        except (RayError, RayServeException) as error:
            logger.warning("the cluster could not be drained: %s", error)


def _end_serve(told: threading.Event, given_up: threading.Event) -> None:
    """Has Serve's controller end its applications and then itself, and waits until it has."""
    import ray

    with contextlib.suppress(ValueError):  # there is none (any more)
        ray.get(_serve_controller().graceful_shutdown.remote(wait=False))
        told.set()
        while not given_up.wait(_POLL_S):
            _serve_controller()


def _serve_controller() -> ActorHandle:
    """Raises ValueError where Serve does not run on this Ray."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
