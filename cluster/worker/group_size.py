"""How many shards a model gets where the configuration leaves that to the devices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cluster.core.devices import Devices
from cluster.core.memory_plan import choose_group
from cluster.distributed.config import ParallelConfig
from cluster.errors import CheckpointError
from cluster.worker.config import WorkerConfig


def decide_sizes(
    checkpoint: Path,
    worker: WorkerConfig,
    parallel: ParallelConfig,
    devices: Devices,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> tuple[ParallelConfig, str]:
    """The configuration with numbers for its sizes, and why these.

    Args:
        max_num_seqs, max_num_batched_tokens: the largest step, as in SchedulerConfig.

    Raises:
        ConfigError: the devices do not hold the model; the message says what helps.
        CheckpointError: ``config.json`` is missing or broken.
    """
    file = checkpoint / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    plan = choose_group(
        config,
        devices,
        tp=parallel.tp,
        pp=parallel.pp,
        dtype=worker.dtype,
        weights=worker.weights,
        kv_cache_dtype=worker.kv_cache_dtype,
        kv_cache_bytes=worker.kv_cache_bytes,
        max_model_len=worker.max_model_len,
        model_impl=worker.model_impl,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    return replace(parallel, tp=plan.tp_size, pp=plan.pp_size), plan.reason
