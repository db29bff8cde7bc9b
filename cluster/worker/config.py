"""How a worker holds a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.errors import require


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Device, number format and memory.

    Attributes:
        device: where the model runs; auto takes CUDA where there is one.
        dtype: of weights and activations; auto keeps the checkpoint's on CUDA and takes float32 on CPU.
        block_size: tokens per KV block.
        kv_cache_bytes: memory for the KV pool; unset: on CPU a quarter of the free memory, at most 1 GiB; on CUDA what
            gpu_memory_utilization leaves.
        gpu_memory_utilization: share of the device's memory that this replica's weights, activations and KV pool may
            take together; what others hold on the device does not count.
        max_model_len: context limit in tokens; unset takes the checkpoint's.
        num_threads: CPU threads of the forward pass; unset: all cores.
        model_impl: auto takes our own model code and falls back to transformers' for other architectures.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    block_size: int = 16
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    num_threads: int | None = None
    model_impl: Literal["auto", "cluster", "transformers"] = "auto"

    def __post_init__(self) -> None:
        require(self.block_size >= 1, "block_size", "must be at least 1")
        require(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "must be in (0, 1]")
        for name in ("kv_cache_bytes", "max_model_len", "num_threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "must be at least 1, or unset")
