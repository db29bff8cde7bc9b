"""A model's weights as the Triton kernels read them: matrices quantized on the device, one after the other."""

from __future__ import annotations

import math
from typing import Literal

import torch

from cluster.kernels.triton.packed_weight import num_bytes, pack
from cluster.models.tensor_source import TensorSource
from cluster.models.weights import Target, dense_tensor


def load_quantized(
    targets: list[Target],
    source: TensorSource,
    weights: Literal["int8", "int4"],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Matrices packed, norms and biases as tensors of ``dtype``; no more than one matrix is there twice."""
    for target in targets:
        tensor = dense_tensor(target, source, dtype, device)
        target.put(pack(tensor, target.quantized_format(weights)) if target.is_matrix else tensor)


def quantized_bytes(targets: list[Target], weights: Literal["int8", "int4"], dtype: torch.dtype) -> int:
    """Of all of them, once loaded."""
    return sum(
        num_bytes(target.quantized_format(weights), *target.shape)
        if target.is_matrix
        else dtype.itemsize * math.prod(target.shape)
        for target in targets
    )
