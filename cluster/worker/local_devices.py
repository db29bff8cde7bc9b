"""The devices of this machine."""

from __future__ import annotations

import torch

from cluster.core.devices import Devices
from cluster.worker.config import WorkerConfig
from cluster.worker.kv_cache import free_memory


def local_devices(worker: WorkerConfig) -> Devices:
    """What there is to put shards on: the GPUs that torch sees, or the memory that is free."""
    if worker.device == "cpu" or not torch.cuda.is_available():
        return Devices(kind="cpu", nodes=((free_memory(torch.device("cpu")),),))
    sizes = (torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    return Devices(kind="cuda", nodes=(tuple(sizes),), utilization=worker.gpu_memory_utilization)
