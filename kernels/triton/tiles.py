"""The shape of each kernel's tiles: one table instead of autotuning, which would time kernels at start-up and could
pick another shape, hence other roundings, on the next start.

In batch-invariant mode a kernel's shape does not follow the batch: whatever a row is computed with, its sums run over
the same positions or inputs in the same order, in instructions of the same kind. Otherwise small batches take small
tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Query rows (tokens times the heads of one key-value head) by positions, and how it is run."""

    rows: int
    positions: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class MatmulTile:
    """Rows of activations by outputs, summed over steps of ``inputs``, and how it is run."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


def decode_tile(dtype: torch.dtype, *, batch_invariant: bool) -> AttentionTile:
    if batch_invariant:
        return prefill_tile(dtype, batch_invariant=True)
    return AttentionTile(rows=16, positions=32 if dtype == torch.float32 else 64, num_warps=4, num_stages=3)


def prefill_tile(dtype: torch.dtype, *, batch_invariant: bool) -> AttentionTile:
    if dtype == torch.float32:
        return AttentionTile(rows=16, positions=32, num_warps=4, num_stages=2)
    if batch_invariant:
        # 64 rows: the least that Hopper's warpgroup instruction takes, so that decoding wastes little.
        return AttentionTile(rows=64, positions=64, num_warps=4, num_stages=3)
    return AttentionTile(rows=128, positions=64, num_warps=8, num_stages=3)


# Up to here the Triton kernel reads the weights no slower than cuBLAS does, and needs no larger tile.
MAX_SMALL_ROWS = 16
_MULTIPROCESSORS = 132


def dense_tile(num_rows: int, out_features: int, dtype: torch.dtype, *, batch_invariant: bool) -> MatmulTile:
    if dtype == torch.float32:
        return MatmulTile(rows=32, outputs=32, inputs=32, num_warps=4, num_stages=3)
    # Narrow where a wide tile would leave multiprocessors without weights to read.
    outputs = 32 if out_features < 64 * 2 * _MULTIPROCESSORS else 64
    if not batch_invariant:
        return MatmulTile(rows=16, outputs=outputs, inputs=128, num_warps=4, num_stages=5)
    # Both have 64 rows for each group of four warps and the same inputs: one kind of instruction, one order of the sum.
    if num_rows <= 64:
        return MatmulTile(rows=64, outputs=outputs, inputs=64, num_warps=4, num_stages=6)
    return MatmulTile(rows=128, outputs=128, inputs=64, num_warps=8, num_stages=4)


def quantized_tile(num_rows: int, dtype: torch.dtype, *, batch_invariant: bool) -> MatmulTile:
    """For int8 and int4 weights; the int4 kernel steps by groups instead of ``inputs``."""
    if dtype == torch.float32:
        return MatmulTile(rows=16, outputs=32, inputs=32, num_warps=4, num_stages=2)
    if batch_invariant or num_rows > MAX_SMALL_ROWS:
        return MatmulTile(rows=64, outputs=64, inputs=128, num_warps=4, num_stages=3)
    return MatmulTile(rows=16, outputs=32, inputs=128, num_warps=4, num_stages=4)
