"""The least time that a step can take on a machine: its bytes over the bandwidth, or its operations over the rate.

What counts is what any implementation has to do: each matrix read once, in its format, with its scales and nothing
padded; the keys and values of every context read once; two operations per weight and token. Norms, rotations and
activations are left out, so no engine reaches 100 %, unless its weights stay in the processor's cache between steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.bench.probe import Machine
from cluster.bench.shapes import Shape

_GROUP = 128  # inputs of an int4 weight that share a scale and a zero point
# Per format: bytes of a weight, of what comes with each output, and with each group of an output.
_BYTES: dict[str, tuple[float, float, float]] = {
    "float32": (4.0, 0.0, 0.0),
    "bfloat16": (2.0, 0.0, 0.0),
    "int8": (1.0, 4.0, 0.0),
    "int4": (0.5, 0.0, 4.0),
}
# The embedding and the output head of a model with int4 weights stay int8.
_HEAD = {"int4": "int8"}
# What a weight is multiplied in: on CPUs, float32 activations or int8 ones; on CUDA, 16-bit activations.
_ARITHMETIC = {
    "cpu": {"float32": "float32", "bfloat16": "float32", "int8": "int8", "int4": "int8"},
    "cuda": {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16", "int4": "bfloat16"},
}


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Limits of one model in one format on one machine.

    Attributes:
        weights: format of the matrices: float32, bfloat16, int8 or int4.
        kv_bytes: of one number in the KV cache.
    """

    shape: Shape
    weights: str
    kv_bytes: int
    machine: Machine

    @property
    def weight_bytes(self) -> float:
        """Of the matrices that a step reads, output head included; of the embedding it reads a few rows only."""
        return self._head_bytes + sum(matrix_bytes(out, size, self.weights) for _, out, size in self.shape.linears())

    @property
    def resident_bytes(self) -> float:
        """Of all the weights in memory."""
        embedding = 0.0 if self.shape.tied else self._head_bytes
        vectors = sum(4 * sizes[0] for _, sizes in self.shape.tensors() if len(sizes) == 1)
        return self.weight_bytes + embedding + vectors

    @property
    def kv_bytes_per_token(self) -> int:
        shape = self.shape
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * self.kv_bytes

    def step_s(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> float:
        """Least seconds of a step.

        Args:
            query_lens: tokens that each sequence computes.
            context_lens: tokens of each sequence once they are computed.
        """
        num_tokens, num_rows = sum(query_lens), len(query_lens)
        num_bytes = self.weight_bytes + self.kv_bytes_per_token * sum(context_lens)
        linear_ops = 2.0 * num_tokens * sum(out * size for _, out, size in self.shape.linears())
        head_ops = 2.0 * num_rows * self.shape.vocab_size * self.shape.hidden_size
        # Of a query's positions, half of those in its own chunk lie behind it; scores and values take two each.
        width = self.shape.num_layers * self.shape.num_heads * self.shape.head_dim
        attention_ops = sum(
            4.0 * width * query * (context - (query - 1) / 2)
            for query, context in zip(query_lens, context_lens, strict=True)
        )
        rates = self.machine.ops_per_s
        arithmetic = _ARITHMETIC[self.machine.device]
        linear_rate, attention_rate = rates[arithmetic[self.weights]], rates[arithmetic["bfloat16"]]
        compute_s = (linear_ops + head_ops) / linear_rate + attention_ops / attention_rate
        return max(num_bytes / self.machine.read_bytes_per_s, compute_s)

    def decode_tokens_per_s(self, num_requests: int, prompt_tokens: int, new_tokens: int) -> float:
        """Most tokens a second of ``num_requests`` that decode together, over the whole of their completions."""
        contexts = range(prompt_tokens + 1, prompt_tokens + new_tokens)
        total_s = math.fsum(self.step_s([1] * num_requests, [context] * num_requests) for context in contexts)
        return num_requests * len(contexts) / total_s

    def prefill_tokens_per_s(self, num_tokens: int) -> float:
        return num_tokens / self.step_s([num_tokens], [num_tokens])

    @property
    def _head_bytes(self) -> float:
        return matrix_bytes(self.shape.vocab_size, self.shape.hidden_size, _HEAD.get(self.weights, self.weights))


def matrix_bytes(out_features: int, in_features: int, weights: str) -> float:
    """Of a matrix in a format, with its scales."""
    per_weight, per_output, per_group = _BYTES[weights]
    groups = -(-in_features // _GROUP)
    return out_features * (in_features * per_weight + per_output + groups * per_group)
