"""The bytes that each device of a group takes: weights, activations, KV cache, and what CUDA and NCCL keep."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.core.devices import Devices
from cluster.core.model_shape import ModelShape
from cluster.core.number_formats import ITEM_BYTES, NumberFormats

_MIB = 2**20

CONTEXT_BYTES = 640 * _MIB
"""A CUDA context with the kernels that a process has loaded. 426 MiB were seen on an RTX 6000 Ada with torch 2.10
(unslothai/unsloth-zoo#1053), 616 MiB in an inference server (LMCache/LMCache#4019)."""

GRAPH_BYTES = 28 * _MIB
"""What the driver takes for a captured decode graph; 24 to 28 MiB each in vllm-project/vllm#22897 and #50780."""

COMMUNICATOR_BYTES = 320 * _MIB
"""NCCL's buffers of one communicator: 10 MiB in each of 32 channels of an H100 (NVIDIA/nccl#1685)."""

BLOCK_SIZE = 16
"""Tokens of a KV block."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a group must hold beside the weights.

    Attributes:
        context: tokens of a sequence, prompt and completion together.
        num_contexts: how many of these must find room at once.
        max_num_seqs, max_num_batched_tokens: the largest step.
        kv_cache_bytes: of each shard's KV pool, however many tokens that is; None: all that is left.
    """

    context: int
    num_contexts: int = 1
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    kv_cache_bytes: int | None = None

    @property
    def num_tokens(self) -> int:
        """That need room in the KV cache, in whole blocks per sequence; 0 where the pool has a size of its own."""
        return 0 if self.kv_cache_bytes else self.num_contexts * (-(-self.context // BLOCK_SIZE) * BLOCK_SIZE)


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on each device of one stage; its shards are alike.

    Attributes:
        layers: first and last + 1.
        device_bytes: of the device.
        reserve_bytes: of the CUDA context, graphs, tables and communicators, outside the share.
        usable_bytes: for weights, activations and KV cache.
        kv_token_bytes: of one token in the KV cache.
        kv_cache_bytes: of the KV pool.
    """

    layers: tuple[int, int]
    device_bytes: int
    reserve_bytes: int
    usable_bytes: int
    weight_bytes: int
    activation_bytes: int
    kv_token_bytes: int
    kv_cache_bytes: int

    @property
    def free_bytes(self) -> int:
        """What is left beside all of these; negative where they do not fit."""
        return self.usable_bytes - self.weight_bytes - self.activation_bytes - self.kv_cache_bytes

    @property
    def kv_tokens(self) -> int:
        return max(0, self.kv_cache_bytes // (self.kv_token_bytes * BLOCK_SIZE)) * BLOCK_SIZE


@dataclass(frozen=True)
class GroupMemory:
    """What a group of any size takes to hold one model in one set of formats, for one workload."""

    shape: ModelShape
    formats: NumberFormats
    workload: Workload

    def obstacle(self, tp_size: int, pp_size: int) -> str:
        """Why the model cannot be cut like this; empty: it can."""
        if pp_size > self.shape.num_layers:
            return f"{pp_size} stages are more than its {self.shape.num_layers} layers"
        return self.shape.obstacle_to_tp(tp_size)

    def stages(self, devices: Devices, tp_size: int, pp_size: int) -> tuple[StageMemory, ...]:
        """Every stage, with its layers such that the fullest device is as little full as can be.

        What does not fit shows as negative ``free_bytes``.
        """
        reserve, layer_bytes, kv_bytes = self.reserve(tp_size, pp_size), self.layer(tp_size), self.kv_token(tp_size)
        places = zip(devices.stages(tp_size, pp_size), self.ends(tp_size, pp_size), strict=True)
        bare = [
            StageMemory(
                layers=(0, 0),
                device_bytes=device_bytes,
                reserve_bytes=reserve,
                usable_bytes=devices.usable(device_bytes, reserve),
                weight_bytes=end_bytes,
                activation_bytes=self.activations(tp_size, pp_size, is_last=index == pp_size - 1),
                kv_token_bytes=0,
                kv_cache_bytes=self.workload.kv_cache_bytes or 0,
            )
            for index, (device_bytes, end_bytes) in enumerate(places)
        ]
        room = [stage.free_bytes for stage in bare]
        counts = _split(self.shape.num_layers, room, layer_bytes + self.workload.num_tokens * kv_bytes)
        filled, first = [], 0
        for stage, count in zip(bare, counts, strict=True):
            kv_cache_bytes = self.workload.kv_cache_bytes or self.workload.num_tokens * count * kv_bytes
            filled.append(
                replace(
                    stage,
                    layers=(first, first + count),
                    weight_bytes=stage.weight_bytes + count * layer_bytes,
                    kv_token_bytes=count * kv_bytes,
                    kv_cache_bytes=kv_cache_bytes,
                )
            )
            first += count
        return tuple(filled)

    def layer(self, tp_size: int) -> int:
        """Of the shard with the largest part."""
        group_size = self.formats.group_size(self.shape.intermediate_size)
        parts = (self.shape.layer(tp_size, rank, group_size=group_size) for rank in range(tp_size))
        return max(map(self.formats.part_bytes, parts))

    def kv_token(self, tp_size: int) -> int:
        """Of one token in one layer."""
        return 2 * self.shape.kv_heads_of(tp_size) * self.shape.head_dim * ITEM_BYTES[self.formats.kv_cache_dtype]

    def ends(self, tp_size: int, pp_size: int) -> list[int]:
        """Per stage, the weights beside its layers: embedding on the first, norm and output head on the last.

        One matrix serves as both where weights are tied and both are on one device.
        """
        vocabulary = self.formats.matrix_bytes(self.shape.vocabulary(tp_size))
        ends = [0] * pp_size
        ends[0] += vocabulary
        if pp_size > 1 or not self.shape.tied:
            ends[-1] += vocabulary
        ends[-1] += self.formats.vector_bytes(self.shape.hidden_size)
        return ends

    def activations(self, tp_size: int, pp_size: int, *, is_last: bool) -> int:
        """Of the largest step: what is alive at the same time.

        On the CPU, two float32 copies of the logits, as ``worker/kv_cache.py`` counts; on CUDA a third of those that
        want log probabilities, and what the head's product was before it became float32. Shards of the vocabulary deal
        the rows out among them, so that each has its part of all rows, and then its share of the rows whole. A stage
        that is not alone has the hidden states that it receives.
        """
        tokens, sequences = self.workload.max_num_batched_tokens, self.workload.max_num_seqs
        item = ITEM_BYTES[self.formats.dtype]
        num_bytes = item * tokens * self.shape.activation_width(tp_size)
        if pp_size > 1:
            num_bytes += item * tokens * 2 * self.shape.hidden_size
        if is_last:
            per_logit = 8 if self.formats.device == "cpu" else 12 + item
            dealt = 4 if tp_size > 1 else 0
            num_bytes += (per_logit + dealt) * sequences * self.shape.vocabulary(tp_size).out_features
        return num_bytes

    def reserve(self, tp_size: int, pp_size: int) -> int:
        """Beside weights, activations and KV cache."""
        if self.formats.device == "cpu":
            return 0
        sequences = self.workload.max_num_seqs
        token_table = 4 * sequences * (self.workload.context + 1)
        communicators = (tp_size > 1) + (pp_size > 1)
        graphs = num_graphs(sequences) * GRAPH_BYTES
        return CONTEXT_BYTES + graphs + token_table + communicators * COMMUNICATOR_BYTES


def _split(num_layers: int, room: list[int], layer_bytes: int) -> list[int]:
    """Layers of each stage, at least one, so that the stage with the least left has as much left as can be.

    Args:
        room: bytes of each stage for layers; may be negative.
        layer_bytes: of a layer, with its part of the KV cache.
    """
    counts = [1] * len(room)
    for _ in range(num_layers - len(room)):
        left = [size - (count + 1) * layer_bytes for size, count in zip(room, counts, strict=True)]
        counts[left.index(max(left))] += 1
    return counts


def num_graphs(max_num_seqs: int) -> int:
    """Of the decode graphs of ``worker/cuda_graph.py::graph_sizes``."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, max_num_seqs, 64)]
    return len([size for size in sizes if size < max_num_seqs]) + 1
