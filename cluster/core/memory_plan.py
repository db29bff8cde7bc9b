"""Which group of devices holds a model, in bytes: weights, activations, KV cache, and what the device keeps for itself.

For a configuration that says ``auto``, whoever starts a replica asks before any process is started:

    plan = choose_group(
        json.loads((checkpoint / "config.json").read_text()),
        Devices(kind="cuda", nodes=((h100, h100), (h100, h100)), utilization=worker.gpu_memory_utilization),
        tp=parallel.tp, pp=parallel.pp,  # each a number or "auto"
        dtype=worker.dtype, weights=worker.weights, ...
    )
    replace(parallel, tp=plan.tp_size, pp=plan.pp_size), plan.reason

``nodes`` has the bytes of every device, node by node (``DEVICE_BYTES`` knows common GPUs); of CPUs one number per
machine, the memory that is free there. ConfigError says that no group of them holds the model.

What a GPU of B bytes gives to weights, activations and KV cache is ``min(utilization x B, B - reserve)``: as in
``worker/kv_cache.py``, the share counts only what torch allocates, and the CUDA context, captured graphs and NCCL's
buffers take theirs from the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cluster.core.devices import Devices
from cluster.core.group_memory import BLOCK_SIZE, GroupMemory, StageMemory, Workload
from cluster.core.model_shape import SHARDED_ARCHITECTURES, ModelShape, read_architecture
from cluster.core.number_formats import QUANTIZED, NumberFormats
from cluster.errors import ConfigError

Size = int | Literal["auto"]

GB = 10**9

USUAL_CONTEXT = 8192
"""Tokens that a sequence must find room for where no limit is configured and the model's own context is longer."""

_USUAL_NODE = 8  # devices of a node that "more devices" is said about
_MOST_NODES = 8


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A group that was tried and is too small.

    Attributes:
        why: with its numbers.
        missing_bytes: on the device that lacks most; None: the model cannot be cut like this.
    """

    tp_size: int
    pp_size: int
    why: str
    missing_bytes: int | None = None

    @property
    def name(self) -> str:
        return f"tp {self.tp_size} x pp {self.pp_size}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A group that holds the model.

    Attributes:
        stages: one per stage of the pipeline; empty where the arithmetic is not known for the model.
        rejected: the smaller groups that were tried before, in order.
        reason: why this one, in a sentence.
    """

    tp_size: int
    pp_size: int
    stages: tuple[StageMemory, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    reason: str = ""

    @property
    def name(self) -> str:
        return f"tp {self.tp_size} x pp {self.pp_size}"

    @property
    def kv_tokens(self) -> int:
        """Tokens that every stage has room for."""
        return min((stage.kv_tokens for stage in self.stages), default=0)


def choose_group(
    config: Mapping[str, Any],
    devices: Devices,
    *,
    tp: Size = "auto",
    pp: Size = "auto",
    dtype: str = "auto",
    weights: str = "auto",
    kv_cache_dtype: str = "auto",
    kv_cache_bytes: int | None = None,
    max_model_len: int | None = None,
    model_impl: str = "auto",
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 1024,
) -> Plan:
    """The smallest group that holds a model and one of its longest sequences; see the head of this file.

    Where transformers' code runs the model, that is one shard, and nothing is counted.

    Args:
        config: the checkpoint's ``config.json``.
        max_model_len: None: sequences of USUAL_CONTEXT tokens have to find room, or of the model's context.
        others: as in ParallelConfig, WorkerConfig and SchedulerConfig.

    Raises:
        ConfigError: none of the groups that the devices allow holds it; the message says by how many bytes, and what
            helps.
        CheckpointError: ``config`` lacks a key, or has an impossible one.
    """
    architecture = read_architecture(config)
    if model_impl == "transformers" or architecture not in SHARDED_ARCHITECTURES:
        reason = f"transformers' code runs {architecture}, in one shard"
        return Plan(tp_size=1 if tp == "auto" else tp, pp_size=1 if pp == "auto" else pp, reason=reason)
    shape = ModelShape.from_config(config)
    formats = NumberFormats.choose(
        devices.kind, shape.dtype, dtype=dtype, weights=weights, kv_cache_dtype=kv_cache_dtype
    )
    workload = Workload(
        context=max_model_len or min(shape.max_position_embeddings, USUAL_CONTEXT),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_bytes=kv_cache_bytes,
    )
    return smallest_group(shape, devices, formats, workload, tp=tp, pp=pp)


def smallest_group(
    shape: ModelShape,
    devices: Devices,
    formats: NumberFormats,
    workload: Workload,
    *,
    tp: Size = "auto",
    pp: Size = "auto",
) -> Plan:
    """The fewest devices that hold the model; of as many, those with the fewest stages.

    Args:
        tp, pp: a number leaves no choice of it.

    Raises:
        ConfigError: as ``choose_group``.
    """
    memory = GroupMemory(shape, formats, workload)
    plan, rejected = _search(memory, devices, tp, pp)
    if plan is None:
        raise ConfigError(_nothing_fits(memory, devices, tp, pp, rejected), field="parallel")
    return plan


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / GB:,.1f} GB"


def _search(memory: GroupMemory, devices: Devices, tp: Size, pp: Size) -> tuple[Plan | None, list[Rejected]]:
    """(the first group that holds the model, those before it that do not)."""
    rejected: list[Rejected] = []
    for tp_size, pp_size in _groups(devices, tp, pp):
        tried = _try(memory, devices, tp_size, pp_size)
        if isinstance(tried, Plan):
            return replace(tried, rejected=tuple(rejected), reason=_reason(tried, rejected)), rejected
        rejected.append(tried)
    return None, rejected


def _groups(devices: Devices, tp: Size, pp: Size) -> list[tuple[int, int]]:
    """(tp, pp) by number of devices, fewest stages first."""
    # The shards of a CPU share its memory: only more machines hold more.
    widest = 1 if devices.kind == "cpu" else max(map(len, devices.nodes))
    tp_sizes = range(1, widest + 1) if tp == "auto" else (tp,)
    pp_sizes = range(1, devices.num_devices + 1) if pp == "auto" else (pp,)
    groups = [(tp_size, pp_size) for tp_size in tp_sizes for pp_size in pp_sizes if devices.stages(tp_size, pp_size)]
    return sorted(groups, key=lambda group: (group[0] * group[1], group[1]))


def _try(memory: GroupMemory, devices: Devices, tp_size: int, pp_size: int) -> Plan | Rejected:
    obstacle = memory.obstacle(tp_size, pp_size)
    if obstacle:
        return Rejected(tp_size=tp_size, pp_size=pp_size, why=obstacle)
    stages = memory.stages(devices, tp_size, pp_size)
    fullest = min(stages, key=lambda stage: stage.free_bytes)
    if fullest.free_bytes < 0:
        where = "" if pp_size == 1 else f" of stage {stages.index(fullest) + 1}"
        why = _too_small(fullest, memory.workload, where)
        return Rejected(tp_size=tp_size, pp_size=pp_size, why=why, missing_bytes=-fullest.free_bytes)
    if memory.workload.kv_cache_bytes is None:
        stages = tuple(replace(stage, kv_cache_bytes=stage.kv_cache_bytes + stage.free_bytes) for stage in stages)
    return Plan(tp_size=tp_size, pp_size=pp_size, stages=stages)


def _reason(plan: Plan, rejected: list[Rejected]) -> str:
    reason = f"{plan.name} holds the model, with room for {plan.kv_tokens:,} tokens of KV cache"
    nearest = _nearest(rejected)
    return reason if nearest is None else f"{reason}; {nearest.name} does not: {nearest.why}"


def _nearest(rejected: list[Rejected]) -> Rejected | None:
    """The one that lacks least."""
    sized = [(group.missing_bytes, index) for index, group in enumerate(rejected) if group.missing_bytes is not None]
    return rejected[min(sized)[1]] if sized else None


def _too_small(stage: StageMemory, workload: Workload, where: str) -> str:
    tokens = "" if workload.kv_cache_bytes else f" of {workload.num_tokens:,} tokens"
    return (
        f"each device{where} would hold {gigabytes(stage.usable_bytes - stage.free_bytes)} "
        f"({gigabytes(stage.weight_bytes)} weights, {gigabytes(stage.activation_bytes)} activations, "
        f"{gigabytes(stage.kv_cache_bytes)} KV cache{tokens}), and {gigabytes(stage.usable_bytes)} of its "
        f"{gigabytes(stage.device_bytes)} are usable: {gigabytes(-stage.free_bytes)} are missing"
    )


def _nothing_fits(memory: GroupMemory, devices: Devices, tp: Size, pp: Size, rejected: list[Rejected]) -> str:
    there = f"{_counted(devices.num_devices, 'device')} on {_counted(len(devices.nodes), 'node')}"
    nearest = _nearest(rejected)
    if nearest is None:
        problem = f"{rejected[-1].name}: {rejected[-1].why}" if rejected else "the shards of a stage share a node"
        return f"no group with tp {tp} and pp {pp} can be made of {there}: {problem}"
    remedies = (
        _smaller_weights(memory, devices, tp, pp)
        + _shorter_context(memory, devices, tp, pp)
        + _more_devices(memory, devices)
    )
    helps = f". What would help: {'; '.join(remedies)}" if remedies else ""
    return f"no group of {there} holds the model; nearest is {nearest.name}: {nearest.why}{helps}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _smaller_weights(memory: GroupMemory, devices: Devices, tp: Size, pp: Size) -> list[str]:
    smaller = {"int8": ("int4",), "int4": ()}.get(memory.formats.weights, QUANTIZED)
    for weights in smaller:
        plan, _ = _search(replace(memory, formats=replace(memory.formats, weights=weights)), devices, tp, pp)
        if plan is not None:
            return [f"{weights} weights, as {plan.name}"]
    return []


def _shorter_context(memory: GroupMemory, devices: Devices, tp: Size, pp: Size) -> list[str]:
    """The longest context that some group holds."""
    if memory.workload.kv_cache_bytes is not None:
        return []
    short = replace(memory, workload=replace(memory.workload, context=1))
    tried = [_try(short, devices, *group) for group in _groups(devices, tp, pp)]
    most = max((plan.kv_tokens for plan in tried if isinstance(plan, Plan)), default=0)
    context = most // memory.workload.num_contexts // BLOCK_SIZE * BLOCK_SIZE
    return [f"a context of at most {context:,} tokens"] if context else []


def _more_devices(memory: GroupMemory, devices: Devices) -> list[str]:
    smallest = min(min(node) for node in devices.nodes)
    width = 1 if devices.kind == "cpu" else max(_USUAL_NODE, *map(len, devices.nodes))
    plan, _ = _search(memory, replace(devices, nodes=((smallest,) * width,) * _MOST_NODES), "auto", "auto")
    if plan is None:
        return []
    return [f"{plan.tp_size * plan.pp_size} devices of {gigabytes(smallest)}, as {plan.name}"]
