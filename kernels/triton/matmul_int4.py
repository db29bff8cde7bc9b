"""Product with grouped int4 weights and 16-bit activations:

    y_to = sum_k scale_ok * sum_{i in group k} x_ti (q_oi - zero_ok) + b_o

``q - zero`` is a small integer and exact in both 16-bit types, so the tensor cores multiply it as it is, and a group's
float32 sum takes its scale. A byte holds the inputs i and i + half of its group, each half a contiguous tile: nothing
is shuffled.

Shapes: T rows, I inputs, O outputs, K groups, C = group size / 2.
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
def _matmul_int4_kernel(
    x_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr,
    num_rows, num_inputs, num_outputs, num_groups, stride_x, stride_y,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row_tile, output_tile = tile_of_program(num_rows, num_outputs, BLOCK_T, BLOCK_O)
    row_T = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    output_O = output_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    held_O = output_O < num_outputs
    x_rows = x_ptr + row_T.to(tl.int64)[:, None] * stride_x
    weight_rows = weight_ptr + output_O.to(tl.int64)[None, :] * (num_groups * HALF)
    group_rows = output_O.to(tl.int64) * num_groups
    column_C = tl.arange(0, HALF)
    acc_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for group in range(num_groups):
        packed_CO = tl.load(weight_rows + (group * HALF + column_C)[:, None], mask=held_O[None, :], other=0)
        zero_O = tl.load(zero_ptr + group_rows + group, mask=held_O, other=0).to(tl.int32)
        scale_O = tl.load(scale_ptr + group_rows + group, mask=held_O, other=0.0)
        wide_CO = packed_CO.to(tl.int32)
        # The last group may reach beyond the inputs: what is not there counts as zero activations.
        input_C = group * (2 * HALF) + column_C
        row_held = (row_T < num_rows)[:, None]
        low_TC = tl.load(x_rows + input_C[None, :], mask=row_held & (input_C < num_inputs)[None, :], other=0.0)
        low_CO = ((wide_CO & 15) - zero_O[None, :]).to(low_TC.dtype)
        sum_TO = tl.dot(low_TC, low_CO, input_precision="ieee")
        high_C = input_C + HALF
        high_TC = tl.load(x_rows + high_C[None, :], mask=row_held & (high_C < num_inputs)[None, :], other=0.0)
        high_CO = ((wide_CO >> 4) - zero_O[None, :]).to(low_TC.dtype)
        sum_TO = tl.dot(high_TC, high_CO, sum_TO, input_precision="ieee")
        acc_TO += sum_TO * scale_O[None, :]
    store_rows(acc_TO, bias_ptr, y_ptr, row_T, output_O, num_rows, num_outputs, stride_y, HAS_BIAS)


def matmul_int4(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, *, tile: MatmulTile) -> Tensor:
    """As ``reference.matmul_int4``, in x's dtype; gives (T, O).

    Args:
        x_TI: the inputs with a unit stride.
        weight: of format int4.
    """
    num_rows, num_outputs = x_TI.shape[0], weight.out_features
    y_TO = torch.empty((num_rows, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    if num_rows:
        grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_outputs, tile.outputs),)
        _matmul_int4_kernel[grid](
            x_TI,
            weight.values,
            weight.scales,
            weight.zeros,
            bias_O,
            y_TO,
            num_rows,
            weight.in_features,
            num_outputs,
            weight.scales.shape[1],
            x_TI.stride(0),
            y_TO.stride(0),
            HAS_BIAS=bias_O is not None,
            BLOCK_T=tile.rows,
            BLOCK_O=tile.outputs,
            HALF=weight.group_size // 2,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y_TO
