"""Dense product with one reduction order: ``y = x W^T + b``.

Every output is one float32 accumulator that takes its inputs in ascending order; no program shares a sum with another,
so there are neither atomics nor a second pass, and a row's result does not depend on the rows beside it.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cluster.kernels.triton.tiles import MatmulTile

_GROUP = tl.constexpr(8)


@triton.jit
def tile_of_program(num_rows, num_outputs, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr):
    """(row tile, output tile) of this program. Up to _GROUP row tiles share their weights before others are read, so
    that what runs together finds both operands in the cache."""
    row_tiles, output_tiles = tl.cdiv(num_rows, BLOCK_T), tl.cdiv(num_outputs, BLOCK_O)
    first_row_tile = tl.program_id(0) // (_GROUP * output_tiles) * _GROUP
    height = tl.minimum(row_tiles - first_row_tile, _GROUP)
    place = tl.program_id(0) % (_GROUP * output_tiles)
    return first_row_tile + place % height, place // height


@triton.jit
def store_rows(
    acc_TO, bias_ptr, y_ptr, row_T, output_O, num_rows, num_outputs, stride_y, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Adds the bias in float32 and stores what is inside."""
    if HAS_BIAS:
        acc_TO += tl.load(bias_ptr + output_O, mask=output_O < num_outputs, other=0.0).to(tl.float32)[None, :]
    target = y_ptr + row_T.to(tl.int64)[:, None] * stride_y + output_O[None, :]
    inside = (row_T < num_rows)[:, None] & (output_O < num_outputs)[None, :]
    tl.store(target, acc_TO.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, num_inputs, num_outputs, stride_x, stride_weight, stride_y,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row_tile, output_tile = tile_of_program(num_rows, num_outputs, BLOCK_T, BLOCK_O)
    row_T = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    output_O = output_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    x_rows = x_ptr + row_T.to(tl.int64)[:, None] * stride_x
    weight_rows = weight_ptr + output_O.to(tl.int64)[None, :] * stride_weight
    acc_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, num_inputs, BLOCK_I):
        input_I = start + tl.arange(0, BLOCK_I)
        held_I = input_I < num_inputs
        x_TI = tl.load(x_rows + input_I[None, :], mask=(row_T < num_rows)[:, None] & held_I[None, :], other=0.0)
        inside_IO = held_I[:, None] & (output_O < num_outputs)[None, :]
        weight_IO = tl.load(weight_rows + input_I[:, None], mask=inside_IO, other=0.0)
        acc_TO = tl.dot(x_TI, weight_IO, acc_TO, input_precision="ieee")
    store_rows(acc_TO, bias_ptr, y_ptr, row_T, output_O, num_rows, num_outputs, stride_y, HAS_BIAS)


def matmul(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, tile: MatmulTile) -> Tensor:
    """As ``torch.nn.functional.linear`` of two dimensions, in x's dtype; gives (T, O).

    Args:
        x_TI, weight_OI: of one dtype, the inputs with a unit stride.
    """
    (num_rows, num_inputs), num_outputs = x_TI.shape, weight_OI.shape[0]
    y_TO = torch.empty((num_rows, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    if num_rows:
        grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_outputs, tile.outputs),)
        _matmul_kernel[grid](
            x_TI,
            weight_OI,
            bias_O,
            y_TO,
            num_rows,
            num_inputs,
            num_outputs,
            x_TI.stride(0),
            weight_OI.stride(0),
            y_TO.stride(0),
            HAS_BIAS=bias_O is not None,
            BLOCK_T=tile.rows,
            BLOCK_O=tile.outputs,
            BLOCK_I=tile.inputs,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y_TO
