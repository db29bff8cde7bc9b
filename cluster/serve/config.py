"""What is served, and on which Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from cluster.distributed.config import ParallelConfig
from cluster.engine.config import EngineConfig
from cluster.errors import require
from cluster.worker.config import WorkerConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model and its replicas.

    Attributes:
        name: what clients call it; unset: the last part of its path.
        path: "demo" (the embedded model), a Hugging Face directory, or a Hub id.
        replicas: how many engines serve it.
        parallel: shards of each replica, and how they talk; the word auto takes the fewest that fit the devices.
        num_cpus: Ray CPUs that each shard reserves; unset: 1, on a local Ray a share of the machine.
        num_gpus: GPUs that each shard reserves; unset: 1 where the worker's device is CUDA, else 0.
        accelerator_type: what Ray calls the devices that shards may run on, e.g. H100; unset: any.
        group_label: Ray node label whose value is a replica's node group: a zone, a rack or an accelerator class.
            Gateways choose the group first, then the replica in it.
        worker: device, number format and memory of each shard.
        engine: batch and queue limits.
        startup_timeout_s: a replica that is not ready by then stops start-up.
        drain_timeout_s: how long running sequences may take to finish when a replica stops.
    """

    path: str
    name: str = ""
    replicas: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    num_cpus: float | None = None
    num_gpus: float | None = None
    accelerator_type: str | None = None
    group_label: str = "ray.io/availability-zone"
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    startup_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        require(bool(self.path), "path", "must be 'demo', a directory or a Hub id")
        if not self.name:
            object.__setattr__(self, "name", PurePosixPath(self.path).name)
        require(bool(self.name), "name", f"is missing, and the path {self.path!r} has no last part to take it from")
        require(self.replicas >= 1, "replicas", "must be at least 1")
        for name in ("num_cpus", "num_gpus"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, "must not be negative")
        require(self.startup_timeout_s > 0, "startup_timeout_s", "must be positive")
        require(self.drain_timeout_s >= 0, "drain_timeout_s", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Which Ray to run on.

    Attributes:
        address: "local" starts one on this machine and ends it with us; "auto" joins the one that runs here; or its
            address.
        num_cpus: CPUs of a local Ray; unset: all cores.
        num_gpus: GPUs of a local Ray; unset: those found.
        object_store_bytes: shared memory of a local Ray; we send nothing large through it.
        dashboard: whether a local Ray runs its dashboard.
        dashboard_host: address that the dashboard binds.
        dashboard_port: 0 takes a free one.
    """

    address: str = "local"
    num_cpus: float | None = None
    num_gpus: float | None = None
    object_store_bytes: int = 128 * 2**20
    dashboard: bool = True
    dashboard_host: str = "127.0.0.1"
    dashboard_port: int = 8265

    def __post_init__(self) -> None:
        require(0 <= self.dashboard_port <= 65535, "dashboard_port", "must be in [0, 65535]")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Structured logs on standard error. Prompts and completions are never in them.

    Attributes:
        level: least severity that is written.
        format: "json" writes one object per line, "text" one readable line.
    """

    level: Literal["debug", "info", "warning", "error"] = "warning"
    format: Literal["json", "text"] = "json"
