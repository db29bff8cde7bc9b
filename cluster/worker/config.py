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
        dtype: of activations; auto keeps the checkpoint's on CUDA and takes float32 on CPU.
        weights: number format of the weight matrices. auto: the checkpoint's precision on CPU, dtype elsewhere. On CPU
            float32 is what is computed with: a bfloat16 checkpoint's matrices are kept as they are, which gives the
            same bits from half the memory. int8 (one scale per output) and int4 (scale and zero per group of at most
            128 inputs; embedding and output head stay int8) are made from the checkpoint on load.
        kv_cache_dtype: of cached keys and values; auto: float32 on CPU with float32 weights, float16 with others; dtype
            elsewhere.
        kernels: auto takes our own kernels where they run; torch leaves them out.
        batch_invariant: on CUDA, tokens that do not depend by one bit on what else is in the batch, for slower steps;
            our CPU kernels have no other mode.
        block_size: tokens per KV block; our CPU kernels take multiples of 16.
        kv_cache_bytes: memory for each shard's KV pool; unset: on CPU a quarter of the free memory, at most 1 GiB,
            shared out to the shards; on CUDA what gpu_memory_utilization leaves.
        gpu_memory_utilization: share of the device's memory that this replica's weights, activations and KV pool may
            take together; what others hold on the device does not count.
        max_model_len: context limit in tokens; unset takes the checkpoint's.
        num_threads: CPU threads of each shard; unset: all cores, shared out to the shards of a host.
        model_impl: auto takes our own model code and falls back to transformers' for other architectures.
        load_format: dummy makes random weights up from config.json alone, to measure with.
        weight_cache_dir: where int8 and int4 copies of checkpoints are kept, so that only the first start quantizes;
            auto: llm-cluster/weights in the user's cache directory (XDG_CACHE_HOME, or ~/.cache); null: nowhere.
        weight_cache_bytes: of all copies together; those used longest ago make room.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weights: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kernels: Literal["auto", "torch"] = "auto"
    batch_invariant: bool = False
    block_size: int = 16
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    num_threads: int | None = None
    model_impl: Literal["auto", "cluster", "transformers"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    weight_cache_dir: str | None = "auto"
    weight_cache_bytes: int = 2**36

    def __post_init__(self) -> None:
        require(self.block_size >= 1, "block_size", "must be at least 1")
        require(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "must be in (0, 1]")
        require(self.weight_cache_bytes >= 1, "weight_cache_bytes", "must be at least 1; set weight_cache_dir to null")
        for name in ("kv_cache_bytes", "max_model_len", "num_threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "must be at least 1, or unset")
