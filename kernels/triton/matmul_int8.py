"""Product with int8 weights and 16-bit activations: ``y_to = scale_o * sum_i x_ti q_oi + b_o``.

Integers up to 127 are exact in both 16-bit types, so the weights are converted on their way into the tensor cores and
the scale of an output is applied to its float32 sum.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cluster.kernels.triton.matmul import store_rows, tile_of_program
from cluster.kernels.triton.packed_weight import PackedWeight
from cluster.kernels.triton.tiles import MatmulTile


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_int8_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, num_rows, num_inputs, num_outputs, stride_x, stride_y,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row_tile, output_tile = tile_of_program(num_rows, num_outputs, BLOCK_T, BLOCK_O)
    row_T = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    output_O = output_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    x_rows = x_ptr + row_T.to(tl.int64)[:, None] * stride_x
    weight_rows = weight_ptr + output_O.to(tl.int64)[None, :] * num_inputs
    acc_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, num_inputs, BLOCK_I):
        input_I = start + tl.arange(0, BLOCK_I)
        held_I = input_I < num_inputs
        x_TI = tl.load(x_rows + input_I[None, :], mask=(row_T < num_rows)[:, None] & held_I[None, :], other=0.0)
        inside_IO = held_I[:, None] & (output_O < num_outputs)[None, :]
        weight_IO = tl.load(weight_rows + input_I[:, None], mask=inside_IO, other=0)
        acc_TO = tl.dot(x_TI, weight_IO.to(x_TI.dtype), acc_TO, input_precision="ieee")
    acc_TO *= tl.load(scale_ptr + output_O, mask=output_O < num_outputs, other=0.0)[None, :]
    store_rows(acc_TO, bias_ptr, y_ptr, row_T, output_O, num_rows, num_outputs, stride_y, HAS_BIAS)


def matmul_int8(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, *, tile: MatmulTile) -> Tensor:
    """As ``reference.matmul_int8``, in x's dtype; gives (T, O).

    Args:
        x_TI: the inputs with a unit stride.
        weight: of format int8.
    """
    num_rows, num_outputs = x_TI.shape[0], weight.out_features
    y_TO = torch.empty((num_rows, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    if num_rows:
        grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_outputs, tile.outputs),)
        _matmul_int8_kernel[grid](
            x_TI,
            weight.values,
            weight.scales,
            bias_O,
            y_TO,
            num_rows,
            weight.in_features,
            num_outputs,
            x_TI.stride(0),
            y_TO.stride(0),
            HAS_BIAS=bias_O is not None,
            BLOCK_T=tile.rows,
            BLOCK_O=tile.outputs,
            BLOCK_I=tile.inputs,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y_TO
