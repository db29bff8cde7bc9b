"""How many shards each model gets where its configuration leaves that to the devices: ``parallel: auto``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.checkpoint import resolve_checkpoint
from cluster.core.devices import DEVICE_BYTES, Devices
from cluster.errors import ConfigError
from cluster.serve.config import ModelConfig
from cluster.serve.placement import choose_device
from cluster.serve.ray_nodes import RayNode
from cluster.worker.group_size import decide_sizes


def is_open(model: ModelConfig) -> bool:
    """Whether the number of its shards is left to the devices."""
    return "auto" in (model.parallel.tp, model.parallel.pp)


def decide_models(models: Sequence[ModelConfig], nodes: Sequence[RayNode]) -> tuple[tuple[ModelConfig, ...], list[str]]:
    """The models with numbers for their sizes, and why, a sentence for each that had none.

    Raises:
        ConfigError: a model does not fit the devices, or their memory is not known.
        CheckpointError: a model's ``config.json`` is missing or broken.
    """
    decided, reasons = [], []
    for model in models:
        if is_open(model):
            try:
                model, reason = _decide(model, nodes)
            except ConfigError as error:
                raise ConfigError(f"model {model.name!r}: {error.message}", field="models") from error
            reasons.append(f"{model.name}: {reason}")
        decided.append(model)
    return tuple(decided), reasons


def _decide(model: ModelConfig, nodes: Sequence[RayNode]) -> tuple[ModelConfig, str]:
    limits = model.engine.scheduler
    parallel, reason = decide_sizes(
        resolve_checkpoint(model.path, weights=False),
        model.worker,
        model.parallel,
        devices_for(model, nodes),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
    )
    return replace(model, parallel=parallel), reason


def devices_for(model: ModelConfig, nodes: Sequence[RayNode]) -> Devices:
    """What one replica of the model may be put on.

    Raises:
        ConfigError: there is nothing, or nobody knows how much memory it has.
    """
    if model.accelerator_type:
        nodes = [node for node in nodes if model.accelerator_type in node.accelerator_types]
    if choose_device(model, sum(node.resources.num_gpus for node in nodes)) == "cpu":
        # Replicas that share a machine share its memory.
        per_node = -(-model.replicas // max(1, len(nodes)))
        devices = Devices(kind="cpu", nodes=tuple((node.memory_bytes // per_node,) for node in nodes))
    else:
        sizes = tuple(
            (_device_bytes(node),) * int(node.resources.num_gpus) for node in nodes if node.resources.num_gpus
        )
        devices = Devices(kind="cuda", nodes=sizes, utilization=model.worker.gpu_memory_utilization)
    if not devices.num_devices:
        raise ConfigError("parallel is auto, and Ray has no node that the model could run on: set parallel.tp and pp")
    return devices


def _device_bytes(node: RayNode) -> int:
    for name in node.accelerator_types:
        if name.lower() in DEVICE_BYTES:
            return DEVICE_BYTES[name.lower()]
    kind = f"a GPU that Ray calls {' or '.join(node.accelerator_types)}" if node.accelerator_types else "its GPUs"
    raise ConfigError(
        f"parallel is auto, and how much memory {kind} has is not known here: set parallel.tp and pp, which `cluster "
        "plan --device-memory` finds"
    )
