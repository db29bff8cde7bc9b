"""The executor that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.distributed.config import ParallelConfig
from cluster.worker.config import WorkerConfig
from cluster.worker.group_executor import GroupExecutor
from cluster.worker.launcher import Launcher
from cluster.worker.process_launcher import ProcessLauncher
from cluster.worker.shard_group import OnRank, start_group

if TYPE_CHECKING:  # it loads torch, which a group's leader does without
    from cluster.worker.local_executor import LocalExecutor


def create_executor(
    checkpoint: Path,
    worker: WorkerConfig,
    parallel: ParallelConfig,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    on_stage: Callable[[str], None] | None = None,
    launcher: Launcher | None = None,
    on_rank: OnRank = lambda rank, node, stage: None,
) -> LocalExecutor | GroupExecutor:
    """Loads a model, here or on a group of shards.

    Args:
        checkpoint: a directory in Hugging Face's layout, the same on every node.
        parallel: its sizes are decided.
        max_num_seqs, max_num_batched_tokens: the largest step, as in SchedulerConfig.
        on_stage: called with each stage's name as it begins.
        launcher: starts a group's shards; None: as subprocesses.
        on_rank: called as each rank of a group reaches each stage of its start.

    Raises:
        ClusterError: checkpoint, configuration or memory; or a shard is late or lost. The message says what to change.
    """
    if parallel.is_single:
        from cluster.worker.local_executor import LocalExecutor

        return LocalExecutor(checkpoint, worker, max_num_seqs, max_num_batched_tokens, on_stage)
    tp_size, pp_size = parallel.sizes
    group = start_group(
        checkpoint,
        worker,
        parallel,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        launcher=launcher or ProcessLauncher(tp_size * pp_size, num_cuda_devices=_num_cuda_devices(worker)),
        on_stage=on_stage or (lambda stage: None),
        on_rank=on_rank,
    )
    return GroupExecutor(group, parallel.step_timeout_s)


def _num_cuda_devices(worker: WorkerConfig) -> int:
    import torch

    return torch.cuda.device_count() if worker.device != "cpu" else 0
