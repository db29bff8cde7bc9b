"""What each replica reserves: pure arithmetic over the configuration and what the machine or the cluster has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.errors import ConfigError
from cluster.serve.config import ModelConfig

# The share of all gateways of a machine where everything runs on one.
LOCAL_GATEWAY_CPUS = 0.1
# What Ray's own examples take of an accelerator type's resource: enough to be sent there, too little to fill it.
_ACCELERATOR_SHARE = 0.001


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a node has to give, or something reserves. CPUs are Ray's logical ones."""

    num_cpus: float
    num_gpus: float

    def count(self, part: Resources) -> int:
        """How often ``part`` goes into this."""
        pairs = ((self.num_cpus, part.num_cpus), (self.num_gpus, part.num_gpus))
        return min((int(have / need + 1e-6) for have, need in pairs if need), default=2**31)


@dataclass(frozen=True, kw_only=True)
class ReplicaPlacement:
    """A model with its device decided, and what each of its replicas reserves.

    A replica of one shard is one actor. One of several is a placement group: a bundle for each pipeline stage, which
    holds all its shards, and in the first one also the engine. A bundle lies on one node.

    Attributes:
        shard: reserved by each shard.
        engine_cpus: reserved by the engine of a group; 0 where the only shard runs in the engine's process.
        strategy: of the placement group. PACK spreads stages over nodes where one node is not enough.
    """

    model: ModelConfig
    shard: Resources
    engine_cpus: float = 0.0
    strategy: Literal["PACK", "STRICT_PACK"] = "PACK"

    @property
    def stages(self) -> list[Resources]:
        """What each pipeline stage reserves on one node, the engine with the first."""
        tp, pp = self.model.parallel.sizes
        return [
            Resources(
                # Ray counts to 1e-4; a sum of floats may be off by a hair.
                num_cpus=round(tp * self.shard.num_cpus + (0.0 if stage else self.engine_cpus), 4),
                num_gpus=tp * self.shard.num_gpus,
            )
            for stage in range(pp)
        ]

    @property
    def replica(self) -> Resources:
        """What a replica reserves in all."""
        stages = self.stages
        return Resources(
            num_cpus=sum(stage.num_cpus for stage in stages), num_gpus=sum(stage.num_gpus for stage in stages)
        )

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The stages as Ray's placement groups take them."""
        accelerator = {f"accelerator_type:{self.model.accelerator_type}": _ACCELERATOR_SHARE}
        return [
            {"CPU": stage.num_cpus}
            | ({"GPU": stage.num_gpus} if stage.num_gpus else {})
            | (accelerator if self.model.accelerator_type else {})
            for stage in self.stages
        ]


def place_locally(models: Sequence[ModelConfig], machine: Resources) -> list[ReplicaPlacement]:
    """Shares one machine out: every CPU shard gets the same part of the cores, for Ray and for its threads.

    Raises:
        ConfigError: the models ask for more than there is.
    """
    num_shards = sum(model.replicas * _num_shards(model) for model in models)
    num_processes = num_shards + sum(model.replicas for model in models if _num_shards(model) > 1)
    # Shards that each used all cores would slow each other down far more than by their share.
    num_threads = max(1, int(machine.num_cpus) // num_shards)
    # Rounded down to what Ray can count (1e-4 CPU).
    share = min(1.0, int((machine.num_cpus - LOCAL_GATEWAY_CPUS) / num_processes * 1e4) / 1e4)
    placements = []
    for model in models:
        placement = _place(model, machine.num_gpus, cpus=share)
        if placement.shard.num_gpus == 0 and model.worker.num_threads is None:
            worker = replace(placement.model.worker, num_threads=num_threads)
            placement = replace(placement, model=replace(placement.model, worker=worker))
        placements.append(replace(placement, strategy="STRICT_PACK"))
    check_fit(placements, [machine], gateway_cpus=LOCAL_GATEWAY_CPUS)
    return placements


def place_anywhere(
    models: Sequence[ModelConfig], nodes: Sequence[Resources] | None, *, num_gateways: int = 1
) -> list[ReplicaPlacement]:
    """Placements on a cluster that exists; None where it is not known what it has (it may grow later).

    Args:
        num_gateways: each reserves a CPU.

    Raises:
        ConfigError: the models ask for more than there is.
    """
    num_gpus = sum(node.num_gpus for node in nodes or ())
    placements = [_place(model, num_gpus, cpus=1.0) for model in models]
    if nodes is None:
        return placements
    check_fit(placements, nodes, gateway_cpus=num_gateways)
    return [
        # A node that could not hold all of them whole must not keep one waiting for it.
        replace(placement, strategy="STRICT_PACK")
        if sum(node.count(placement.replica) for node in nodes) >= placement.model.replicas
        else placement
        for placement in placements
    ]


def check_fit(placements: Sequence[ReplicaPlacement], nodes: Sequence[Resources], *, gateway_cpus: float) -> None:
    """Raises ConfigError where Ray would wait for resources that it does not have."""
    gpus = sum(placement.replica.num_gpus * placement.model.replicas for placement in placements)
    cpus = sum(placement.replica.num_cpus * placement.model.replicas for placement in placements) + gateway_cpus
    all_gpus, all_cpus = sum(node.num_gpus for node in nodes), sum(node.num_cpus for node in nodes)
    if gpus > all_gpus:
        raise ConfigError(
            f"the models ask for {gpus:g} GPUs and Ray has {all_gpus:g}: lower replicas, parallel or num_gpus, or set "
            "worker.device to cpu",
            field="models",
        )
    if cpus > all_cpus + 1e-6:
        raise ConfigError(
            f"gateway and replicas ask for {cpus:g} CPUs and Ray has {all_cpus:g}: lower replicas, parallel or "
            "num_cpus",
            field="models",
        )
    for placement in placements:
        for stage in placement.stages:
            if not any(node.count(stage) for node in nodes):
                tp, _ = placement.model.parallel.sizes
                raise ConfigError(
                    f"a stage of model {placement.model.name!r} has {tp} shards that need {stage.num_gpus:g} GPUs and "
                    f"{stage.num_cpus:g} CPUs on one node, and no node has them: lower parallel.tp, and raise "
                    "parallel.pp, which spreads over nodes",
                    field="models",
                )


def choose_device(model: ModelConfig, available_gpus: float) -> Literal["cpu", "cuda"]:
    """Where the model runs. A shard without a reservation sees no GPU, so this is decided before there is one."""
    if model.worker.device == "auto":
        return "cpu" if model.num_gpus == 0 or available_gpus < 1 else "cuda"
    return model.worker.device


def _num_shards(model: ModelConfig) -> int:
    tp, pp = model.parallel.sizes
    return tp * pp


def _place(model: ModelConfig, available_gpus: float, *, cpus: float) -> ReplicaPlacement:
    """The device decided; ``cpus`` for each process where the model does not say."""
    device = choose_device(model, available_gpus)
    num_gpus = model.num_gpus if model.num_gpus is not None else float(device == "cuda")
    num_cpus = cpus if model.num_cpus is None else model.num_cpus
    return ReplicaPlacement(
        model=replace(model, worker=replace(model.worker, device=device)),
        shard=Resources(num_cpus=num_cpus, num_gpus=num_gpus),
        engine_cpus=min(num_cpus, 1.0) if _num_shards(model) > 1 else 0.0,
    )
