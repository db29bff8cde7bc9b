"""The gate of a SwiGLU MLP: ``silu_mul([gate, up]) = gate / (1 + exp(-gate)) * up``.

Element-wise: nothing is reduced. Shapes: T tokens, F intermediate size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, stride_token, size, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    source = gate_up_ptr + token * stride_token + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * size + column, gated.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """As ``reference.silu_mul``: (T, 2F) with the gates first gives (T, F)."""
    num_tokens, size = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out_TF = torch.empty((num_tokens, size), dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(size, _BLOCK))
        _silu_mul_kernel[grid](gate_up_TF, out_TF, gate_up_TF.stride(0), size, BLOCK=_BLOCK)
    return out_TF
