"""How many KV blocks fit, and their memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.kernels.cpu import memory
from cluster.models.registry import Model
from cluster.worker.config import WorkerConfig

_CPU_SHARE = 0.25
_CPU_LIMIT_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class KVCacheShape:
    """A KV cache but for its number of blocks."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Of one block over all layers, keys and values."""
        elements = 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim
        return elements * self.dtype.itemsize

    def allocate(self, num_blocks: int, device: torch.device) -> list[Tensor]:
        """One zeroed (2, num_blocks, block_size, kv_heads, head_dim) per layer.

        Zeros, because attention multiplies what it hides by 0, which only finite numbers survive.
        """
        shape = (2, num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
        if device.type == "cuda":
            return [torch.zeros(shape, dtype=self.dtype, device=device) for _ in range(self.num_layers)]
        num_bytes = int(np.prod(shape)) * self.dtype.itemsize
        return [memory.zeros(num_bytes).view(self.dtype).view(shape) for _ in range(self.num_layers)]


def kv_budget(*, free: int, total: int, held: int, activations: int, utilization: float) -> int:
    """Bytes for the KV pool on a device that others may use too; negative where the weights alone exceed the share.

    ``utilization`` is this process's share of the whole device: memory that others hold counts only in so far as it
    is not free.

    Args:
        free: bytes that nobody holds.
        total: bytes of the device.
        held: bytes that this process holds, the weights among them.
        activations: bytes that the largest step needs on top.
        utilization: in (0, 1].
    """
    return min(free, int(utilization * total) - held) - activations


def count_blocks(
    shape: KVCacheShape, config: WorkerConfig, *, device: torch.device, free_bytes: int, num_sharers: int = 1
) -> int:
    """Blocks of the pool: ``kv_cache_bytes`` where it is set; else on CPU a quarter of the free memory, at most 1 GiB,
    and on CUDA all that is free.

    Args:
        num_sharers: shards that take the CPU's quarter together, in equal parts.
        free_bytes: on CUDA, what ``gpu_memory_utilization`` leaves beside weights and activations.

    Raises:
        ConfigError: not one block fits, or ``kv_cache_bytes`` exceeds what is free.
    """
    field = "worker.kv_cache_bytes"
    if config.kv_cache_bytes is not None:
        budget, advice = config.kv_cache_bytes, "raise worker.kv_cache_bytes"
        if budget > free_bytes:
            raise ConfigError(
                f"worker.kv_cache_bytes asks for {_mib(budget)}, but {_mib(free_bytes)} are free on {device}: "
                f"lower it, or free memory",
                field=field,
            )
    elif device.type == "cpu":
        budget = min(int(free_bytes * _CPU_SHARE), _CPU_LIMIT_BYTES) // num_sharers
        advice = "free memory, or set worker.kv_cache_bytes"
    else:
        budget, field = free_bytes, "worker.gpu_memory_utilization"
        advice = (
            "raise worker.gpu_memory_utilization, lower engine.scheduler.max_num_batched_tokens, or free the device"
        )
    if budget < shape.block_bytes:
        raise ConfigError(
            f"one KV block of {shape.block_size} tokens needs {_mib(shape.block_bytes)}, but {_mib(max(budget, 0))} "
            f"are left for the KV cache: {advice}",
            field=field,
        )
    return budget // shape.block_bytes


def check_weights_fit(num_bytes: int, weights: str, device: torch.device) -> None:
    """Raises ConfigError where the weights alone exceed the device's free memory.

    Args:
        num_bytes: of all weights as they will be held.
        weights: their number format.
    """
    free = free_memory(device)
    if num_bytes > free:
        raise ConfigError(
            f"the weights need {_mib(num_bytes)} as {weights}, but {_mib(free)} are free on {device}: free memory, "
            f"choose a smaller worker.weights or worker.dtype, or a smaller model",
            field="worker.weights",
        )


def step_bytes(model: Model, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Activations of the largest step on the CPU: what is alive at the same time, in float32.

    A layer's widest tensors (as ``model.activation_width`` counts them) for every token of the step, and where logits
    are computed two copies of those of every sequence: the output head's and the sampler's.
    """
    num_logits = 2 * max_num_seqs * model.vocab_size if model.is_last_stage else 0
    return 4 * (max_num_batched_tokens * model.activation_width + num_logits)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now: of the device, or of this machine within the process's memory limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    free = _available_memory()
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return free


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.3f} MiB"
