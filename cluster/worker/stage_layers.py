"""Which layers each stage of a group runs: by what they take there in time, within what its devices hold."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.core.devices import DeviceKind
from cluster.core.group_memory import BLOCK_SIZE, COMMUNICATOR_BYTES, CONTEXT_BYTES, GroupMemory, Workload
from cluster.core.layer_split import StageTimes, split_layers
from cluster.core.model_shape import ModelShape
from cluster.core.number_formats import NumberFormats
from cluster.errors import CheckpointError, Unsupported
from cluster.worker.config import WorkerConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMeasure:
    """What a rank finds before its layers are decided.

    Attributes:
        times: of the parts of its stage.
        device: what it runs on.
        device_bytes: of the whole device, or machine.
        free_bytes: that the rank may take of them; of a machine's memory, its part.
        machine: whose CPU it is: ranks that share it are alike, and what sets their times apart is noise; empty: the
            device is the rank's own.
    """

    times: StageTimes
    device: DeviceKind
    device_bytes: int
    free_bytes: int
    machine: str = ""


def measure_memory(config: WorkerConfig, num_sharers: int) -> tuple[DeviceKind, int, int]:
    """``device``, ``device_bytes`` and ``free_bytes`` of this process's RankMeasure.

    Args:
        num_sharers: ranks on this machine.
    """
    import torch

    from cluster.worker.kv_cache import free_memory

    if config.device != "cpu" and torch.cuda.is_available():
        free_bytes, device_bytes = torch.cuda.mem_get_info()
        return "cuda", device_bytes, free_bytes
    free_bytes = free_memory(torch.device("cpu"))
    return "cpu", free_bytes, free_bytes // num_sharers


def choose_layers(
    checkpoint: Path,
    config: WorkerConfig,
    tp_size: int,
    measures: Sequence[RankMeasure],
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> tuple[tuple[int, int], ...]:
    """First and last + 1 of each stage's layers.

    Args:
        measures: of every rank, by rank.
        max_num_seqs, max_num_batched_tokens: the largest step.

    Raises:
        CheckpointError: ``config.json`` is missing or does not say how many layers there are.
        ConfigError: there are fewer layers than stages, or their weights do not fit.
    """
    values = _read_json(checkpoint / "config.json")
    num_layers = values.get("num_hidden_layers")
    if not isinstance(num_layers, int):
        raise CheckpointError(f"{checkpoint / 'config.json'}: num_hidden_layers is {num_layers!r}, not a whole number")
    measures = [replace(measure, times=_steady_times(measure, measures)) for measure in measures]
    stages = [measures[first : first + tp_size] for first in range(0, len(measures), tp_size)]
    # A stage is as slow as the slowest of its shards, which wait for each other.
    times = [
        StageTimes(
            layer_s=max(rank.times.layer_s for rank in stage),
            embedding_s=max(rank.times.embedding_s for rank in stage),
            head_s=max(rank.times.head_s for rank in stage),
        )
        for stage in stages
    ]
    try:
        shape = ModelShape.from_config(values, source=str(checkpoint / "config.json"))
    except Unsupported:
        return split_layers(num_layers, times)
    context = min(config.max_model_len or shape.max_position_embeddings, shape.max_position_embeddings)
    max_layers: list[int] = []
    # A whole context's KV beside the weights where that is possible, else what lets the model start at all.
    for num_tokens in (context, BLOCK_SIZE):
        workload = Workload(
            context=num_tokens,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_bytes=config.kv_cache_bytes,
        )
        max_layers = _max_layers(config, shape, workload, tp_size, stages)
        if min(max_layers) >= 1 and sum(max_layers) >= num_layers:
            break
    _log.info("layers that fit the stages: %s", max_layers)
    return split_layers(num_layers, times, max_layers)


def _steady_times(measure: RankMeasure, measures: Sequence[RankMeasure]) -> StageTimes:
    """The rank's own, or the best of those that it shares a machine with: noise makes times longer, not shorter."""
    alike = [each.times for each in measures if measure.machine and each.machine == measure.machine] or [measure.times]
    return StageTimes(
        layer_s=min(times.layer_s for times in alike),
        embedding_s=min(times.embedding_s for times in alike),
        head_s=min(times.head_s for times in alike),
    )


def _max_layers(
    config: WorkerConfig,
    shape: ModelShape,
    workload: Workload,
    tp_size: int,
    stages: Sequence[Sequence[RankMeasure]],
) -> list[int]:
    """What each stage's smallest device holds, beside what else lies on it."""
    device = stages[0][0].device
    formats = NumberFormats.choose(
        device, shape.dtype, dtype=config.dtype, weights=config.weights, kv_cache_dtype=config.kv_cache_dtype
    )
    memory, pp_size = GroupMemory(shape, formats, workload), len(stages)
    layer_bytes = memory.layer(tp_size) + workload.num_tokens * memory.kv_token(tp_size)
    # The context and the communicators are there already, and not among what is free.
    num_communicators = (tp_size > 1) + (pp_size > 1)
    reserve = memory.reserve(tp_size, pp_size) - CONTEXT_BYTES - num_communicators * COMMUNICATOR_BYTES
    max_layers = []
    for index, (stage, end_bytes) in enumerate(zip(stages, memory.ends(tp_size, pp_size), strict=True)):
        usable = min(_usable(rank, config, max(0, reserve)) for rank in stage)
        beside = end_bytes + memory.activations(tp_size, pp_size, is_last=index == pp_size - 1)
        max_layers.append((usable - beside - (workload.kv_cache_bytes or 0)) // layer_bytes)
    return max_layers


def _usable(rank: RankMeasure, config: WorkerConfig, reserve_bytes: int) -> int:
    if rank.device == "cpu":
        return rank.free_bytes
    return min(int(config.gpu_memory_utilization * rank.device_bytes), rank.free_bytes - reserve_bytes)


def _read_json(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values
