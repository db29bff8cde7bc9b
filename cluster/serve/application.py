"""The Serve application: one deployment per model, and the gateway as its ingress."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application

from cluster.config import ClusterConfig, effective_config
from cluster.gateway.listener import is_loopback
from cluster.serve.cluster_certificate import ClusterCertificate
from cluster.serve.gateway_deployment import GatewayDeployment
from cluster.serve.identity import ClusterIdentity
from cluster.serve.placement import ReplicaPlacement
from cluster.serve.replica import ModelReplica

# Serve kills what has not stopped by then; the drain itself must fit.
_STOP_MARGIN_S = 10.0
# Half of that passes, in the mean, before Serve sees that an actor is gone.
_HEALTH_CHECK_PERIOD_S = 1.0
# A first start that fails would fail again; what dies later is rebuilt without limit.
_MAX_CONSTRUCTOR_RETRIES = 1
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


def _reservation(placement: ReplicaPlacement, runtime_env: dict[str, Any]) -> dict[str, Any]:
    """A deployment's options that say what each replica reserves, and where."""
    model = placement.model
    if model.parallel.is_single:
        options = {"num_cpus": placement.shard.num_cpus, "num_gpus": placement.shard.num_gpus, **runtime_env}
        if model.accelerator_type:
            options["accelerator_type"] = model.accelerator_type
        return {"ray_actor_options": options}
    return {
        # The engine, in the first bundle; its shards take the rest.
        "ray_actor_options": {"num_cpus": placement.engine_cpus, **runtime_env},
        "placement_group_bundles": placement.bundles,
        "placement_group_strategy": placement.strategy,
    }


def create_application(
    config: ClusterConfig,
    placements: Sequence[ReplicaPlacement],
    *,
    start_id: str | None,
    gateway_cpus: float,
    replica_host: str | None = None,
    environment: dict[str, str] | None = None,
) -> Application:
    """Wires gateway and models.

    Args:
        start_id: key of the start-up reports; None: nobody waits for them.
        gateway_cpus: what each gateway reserves.
        replica_host: address that replicas bind; None: their node's.
        environment: variables that the actors need and their nodes do not have.
    """
    # Replicas on this machine's loopback are out of others' reach; elsewhere both ends prove themselves.
    is_private = replica_host is not None and is_loopback(replica_host)
    identity = ClusterIdentity(
        secret=secrets.token_hex(32),
        start_id=start_id,
        logging=config.logging,
        replica_host=replica_host,
        certificate=None if is_private else ClusterCertificate.create(),
    )
    runtime_env = {"runtime_env": {"env_vars": environment}} if environment else {}
    models = {}
    for placement in placements:
        model = placement.model
        deployment = serve.deployment(
            ModelReplica,
            name=f"model-{model.name}",
            num_replicas=model.replicas,
            **_reservation(placement, runtime_env),
            health_check_period_s=_HEALTH_CHECK_PERIOD_S,
            # Being busy is not being ill: the check itself looks for progress.
            health_check_timeout_s=60,
            graceful_shutdown_wait_loop_s=0.05,
            graceful_shutdown_timeout_s=model.drain_timeout_s + _STOP_MARGIN_S,
            max_constructor_retry_count=_MAX_CONSTRUCTOR_RETRIES,
            logging_config=_QUIET,
        )
        models[model.name] = deployment.bind(model, config.classes, placement.shard, identity)
    gateway = serve.deployment(
        GatewayDeployment,
        name="Gateway",
        num_replicas=config.gateway.replicas,
        ray_actor_options={"num_cpus": gateway_cpus, **runtime_env},
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.05,
        graceful_shutdown_timeout_s=config.gateway.drain_timeout_s + _STOP_MARGIN_S,
        max_constructor_retry_count=_MAX_CONSTRUCTOR_RETRIES,
        logging_config=_QUIET,
    )
    paths = {placement.model.name: placement.model.path for placement in placements}
    num_replicas = {placement.model.name: placement.model.replicas for placement in placements}
    return gateway.bind(
        config.gateway, config.classes, paths, models, num_replicas, identity, configuration=effective_config(config)
    )
