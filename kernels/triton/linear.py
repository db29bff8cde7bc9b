"""Linear layers and the embedding: which product serves which weight and how many rows.

Shapes: T rows, I inputs, O outputs, V vocabulary, D hidden size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cluster.kernels import torch_ops
from cluster.kernels.triton.matmul import matmul
from cluster.kernels.triton.matmul_int4 import matmul_int4
from cluster.kernels.triton.matmul_int8 import matmul_int8
from cluster.kernels.triton.packed_weight import PackedWeight
from cluster.kernels.triton.tiles import MAX_SMALL_ROWS, dense_tile, quantized_tile


def linear(
    x_TI: Tensor, weight: Tensor | PackedWeight, bias_O: Tensor | None = None, *, batch_invariant: bool
) -> Tensor:
    """``x W^T + b`` in x's dtype; gives (T, O).

    Dense weights go to cuBLAS above a few rows, unless ``batch_invariant``: cuBLAS picks its algorithm, and with it the
    order of the sum, by the number of rows.
    """
    num_rows = x_TI.shape[0]
    if isinstance(weight, PackedWeight):
        tile = quantized_tile(num_rows, x_TI.dtype, batch_invariant=batch_invariant)
        product = matmul_int8 if weight.format == "int8" else matmul_int4
        return product(x_TI, weight, bias_O, tile=tile)
    if num_rows > MAX_SMALL_ROWS and not batch_invariant:
        return F.linear(x_TI, weight, bias_O)
    tile = dense_tile(num_rows, weight.shape[0], x_TI.dtype, batch_invariant=batch_invariant)
    return matmul(x_TI, weight, bias_O, tile=tile)


def embedding(input_ids_T: Tensor, weight: Tensor | PackedWeight, *, first_id: int | None = None) -> Tensor:
    """Rows of the weight (V, D); gives (T, D) in its dtype, for quantized weights that of the matrix they came from.

    Args:
        first_id: as in ``reference.embedding``.
    """
    if not isinstance(weight, PackedWeight):
        return torch_ops.embedding(input_ids_T, weight, first_id=first_id)
    if first_id is None:
        return weight.rows(input_ids_T).to(weight.dtype)
    rows_T, is_foreign_T1 = torch_ops.held_rows(input_ids_T, first_id, weight.out_features)
    return weight.rows(rows_T).to(weight.dtype).masked_fill_(is_foreign_T1, 0)
