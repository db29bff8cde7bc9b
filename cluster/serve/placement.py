"""What each replica reserves: pure arithmetic over the configuration and what the machine or the cluster has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.errors import ConfigError
from cluster.serve.config import ModelConfig

# The gateway's share of a machine where everything runs on one.
LOCAL_GATEWAY_CPUS = 0.1


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What Ray has to give. CPUs are Ray's logical ones."""

    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, kw_only=True)
class ReplicaPlacement:
    """A model with its device decided, and what each of its replicas reserves."""

    model: ModelConfig
    num_cpus: float
    num_gpus: float


def place_locally(models: tuple[ModelConfig, ...], machine: Resources) -> list[ReplicaPlacement]:
    """Shares one machine out: every CPU replica gets the same part of the cores, for Ray and for its threads.

    Raises:
        ConfigError: the models ask for more than there is.
    """
    num_replicas = sum(model.replicas for model in models)
    # Replicas that each used all cores would slow each other down far more than by their share.
    num_threads = max(1, int(machine.num_cpus) // num_replicas)
    # Rounded down to what Ray can count (1e-4 CPU).
    share = int((machine.num_cpus - LOCAL_GATEWAY_CPUS) / num_replicas * 1e4) / 1e4
    placements = []
    for model in models:
        placement = _decide_device(model, machine)
        if placement.num_gpus == 0 and model.worker.num_threads is None:
            worker = replace(placement.model.worker, num_threads=num_threads)
            placement = replace(placement, model=replace(placement.model, worker=worker))
        if model.num_cpus is None:
            placement = replace(placement, num_cpus=min(1.0, share))
        placements.append(placement)
    check_fit(placements, machine, gateway_cpus=LOCAL_GATEWAY_CPUS)
    return placements


def place_anywhere(models: tuple[ModelConfig, ...], cluster: Resources | None) -> list[ReplicaPlacement]:
    """Placements on a cluster that exists; None where it is not known what it has (it may grow later).

    Raises:
        ConfigError: the models ask for more than there is.
    """
    placements = [_decide_device(model, cluster or Resources(num_cpus=0, num_gpus=0)) for model in models]
    if cluster is not None:
        check_fit(placements, cluster, gateway_cpus=1)
    return placements


def check_fit(placements: list[ReplicaPlacement], available: Resources, *, gateway_cpus: float) -> None:
    """Raises ConfigError where Ray would wait for resources that it does not have."""
    cpus = gateway_cpus + sum(placement.num_cpus * placement.model.replicas for placement in placements)
    gpus = sum(placement.num_gpus * placement.model.replicas for placement in placements)
    if gpus > available.num_gpus:
        raise ConfigError(
            f"the models ask for {gpus:g} GPUs and Ray has {available.num_gpus:g}: lower replicas or num_gpus, or set "
            "worker.device to cpu",
            field="models",
        )
    if cpus > available.num_cpus + 1e-6:
        raise ConfigError(
            f"gateway and replicas ask for {cpus:g} CPUs and Ray has {available.num_cpus:g}: lower replicas or "
            "num_cpus",
            field="models",
        )


def _decide_device(model: ModelConfig, available: Resources) -> ReplicaPlacement:
    device = model.worker.device
    if device == "auto":
        # A replica without a reservation sees no GPU, so the choice is made here.
        device = "cpu" if model.num_gpus == 0 or available.num_gpus < 1 else "cuda"
    num_gpus = model.num_gpus if model.num_gpus is not None else float(device == "cuda")
    return ReplicaPlacement(
        model=replace(model, worker=replace(model.worker, device=device)),
        num_cpus=1.0 if model.num_cpus is None else model.num_cpus,
        num_gpus=num_gpus,
    )
