"""What numbers a model is held in, and the bytes that they take: the arithmetic of the kernels' own weight layouts.

    cpu    kernels/cpu/linear.py: rows padded to a tile of 16, every parameter to 64 bytes, norms and biases float32
    cuda   dense tensors, or kernels/triton/packed_weight.py: int8 with a scale per output, int4 with a scale and a zero
           per group of 128 inputs

``tests/parity/test_memory_plan_bytes.py`` holds them against the loader's own count.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.devices import DeviceKind
from cluster.core.model_shape import Matrix, Part
from cluster.errors import ConfigError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED = ("int8", "int4")

_CPU_TILE = 16
_CPU_ALIGNMENT = 64
_CPU_GROUP_SIZES = (128, 112, 96, 80, 64, 48, 32)
_CUDA_GROUP_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class NumberFormats:
    """
    Attributes:
        dtype: of activations, and on CUDA of norms and biases.
        weights: of the matrices: a dtype, int8 or int4.
        kv_cache_dtype: of cached keys and values.
    """

    device: DeviceKind
    dtype: str
    weights: str
    kv_cache_dtype: str

    @classmethod
    def choose(
        cls,
        device: DeviceKind,
        checkpoint_dtype: str,
        *,
        dtype: str = "auto",
        weights: str = "auto",
        kv_cache_dtype: str = "auto",
    ) -> NumberFormats:
        """As the worker chooses with our own kernels (``worker/numbers.py``); arguments are WorkerConfig's fields.

        Raises:
            ConfigError: the device's kernels do not hold weights in this format.
        """
        if device == "cpu":
            if weights == "auto":
                weights = "bfloat16" if checkpoint_dtype == "bfloat16" else "float32"
            if weights not in ("float32", "bfloat16", *QUANTIZED):
                raise ConfigError(
                    f"weights are {weights}; the CPU kernels take float32, bfloat16, int8 or int4", field="weights"
                )
            if kv_cache_dtype == "auto":
                kv_cache_dtype = "float32" if weights == "float32" else "float16"
            return cls(device=device, dtype="float32", weights=weights, kv_cache_dtype=kv_cache_dtype)
        if dtype == "auto":
            dtype = checkpoint_dtype if weights in ("auto", *QUANTIZED) else weights
        return cls(
            device=device,
            dtype=dtype,
            weights=weights if weights in QUANTIZED else dtype,
            kv_cache_dtype=dtype if kv_cache_dtype == "auto" else kv_cache_dtype,
        )

    def group_size(self, in_features: int) -> int:
        """Inputs of a matrix that share a scale; 1: every input has its own number, or all share one."""
        if self.device == "cpu":
            return _cpu_group_size(in_features) if self.weights in QUANTIZED else 1
        return _CUDA_GROUP_SIZE if self.weights == "int4" else 1

    def part_bytes(self, part: Part) -> int:
        return sum(self.matrix_bytes(matrix) for matrix in part.matrices) + sum(map(self.vector_bytes, part.vectors))

    def vector_bytes(self, size: int) -> int:
        return _aligned(4 * size) if self.device == "cpu" else ITEM_BYTES[self.dtype] * size

    def matrix_bytes(self, matrix: Matrix) -> int:
        """Scales, zeros and padding included."""
        weights = self.weights
        if weights == "int4" and matrix.is_vocabulary:
            weights = "int8"  # as models/weights.py packs embedding and output head
        if self.device == "cpu":
            return matrix.count * _aligned(_cpu_bytes(weights, matrix))
        return matrix.count * _cuda_bytes(weights, matrix.out_features, matrix.in_features)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _CPU_ALIGNMENT) * _CPU_ALIGNMENT


def _cpu_bytes(weights: str, matrix: Matrix) -> int:
    outputs, inputs = -(-matrix.out_features // _CPU_TILE) * _CPU_TILE, matrix.in_features
    if weights == "bfloat16":
        inputs += inputs % 2  # packed in pairs
    if weights not in QUANTIZED:
        return outputs * inputs * ITEM_BYTES[weights]
    first, last, whole = matrix.columns or (0, inputs, inputs)
    group_size = _cpu_group_size(whole)
    if first % group_size or (last % group_size and last != whole):
        group_size = _cpu_group_size(inputs)  # cut inside a group: the part is quantized by itself
    num_groups = -(-inputs // group_size)
    if weights == "int8":
        return outputs * (num_groups * group_size + 4)
    return outputs * num_groups * (group_size // 2 + 4)


def _cpu_group_size(in_features: int) -> int:
    return next((size for size in _CPU_GROUP_SIZES if in_features % size == 0), _CPU_GROUP_SIZES[0])


def _cuda_bytes(weights: str, out_features: int, in_features: int) -> int:
    if weights == "int8":
        return out_features * (in_features + 4)
    if weights == "int4":
        return out_features * -(-in_features // _CUDA_GROUP_SIZE) * (_CUDA_GROUP_SIZE // 2 + 4 + 1)
    return out_features * in_features * ITEM_BYTES[weights]
