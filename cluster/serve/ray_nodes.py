"""The nodes of the Ray that this process is connected to."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from cluster.serve.placement import Resources

_ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True, kw_only=True)
class RayNode:
    """A node that lives.

    Attributes:
        memory_bytes: that Ray counts on: what was free when the node started, less a part.
        accelerator_types: Ray's names of its devices' kind, the most general and more exact ones.
    """

    resources: Resources
    memory_bytes: int
    accelerator_types: tuple[str, ...] = ()


def alive_nodes() -> list[RayNode]:
    return [
        RayNode(
            resources=Resources(num_cpus=found.get("CPU", 0.0), num_gpus=found.get("GPU", 0.0)),
            memory_bytes=int(found.get("memory", 0)),
            accelerator_types=tuple(name.removeprefix(_ACCELERATOR) for name in found if name.startswith(_ACCELERATOR)),
        )
        for found in (node["Resources"] for node in ray.nodes() if node["Alive"])
    ]
