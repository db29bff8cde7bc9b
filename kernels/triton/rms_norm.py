"""Root-mean-square normalisation, alone and fused with the residual addition before it.

    rms_norm(x)          = x / sqrt(mean(x^2) + eps) * weight
    add_rms_norm(x, res) = rms_norm(x + res), x + res

One program per row; its reduction runs over one block that holds the whole row, so the order of the sum depends on the
row's length alone.

Shapes: T tokens, N heads, D normalised size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, stride_token, stride_head, stride_out_token, stride_out_head, num_heads, size, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    source = x_ptr + row // num_heads * stride_token + row % num_heads * stride_head
    x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    target = out_ptr + row // num_heads * stride_out_token + row % num_heads * stride_out_head
    tl.store(target + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, stride_x, stride_residual, size, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0)
    # Rounded to the stream's dtype before it is normalised: the next layer adds to what is stored, not to more digits.
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + row * size + column, total, mask=inside)
    wide = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / size + eps)
    tl.store(out_ptr + row * size + column, (wide * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """As ``reference.rms_norm``.

    Args:
        x: (T, D), or (T, N, D) with any strides but a unit one for D, as a slice of a packed projection has.
        out: of x's shape and under the same rule; x itself is allowed. None: a new tensor, contiguous.
    """
    size, num_heads = x.shape[-1], 1 if x.dim() == 2 else x.shape[1]
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(x.shape[0] * num_heads,)](
        x,
        weight_D,
        out,
        x.stride(0),
        0 if x.dim() == 2 else x.stride(1),
        out.stride(0),
        0 if x.dim() == 2 else out.stride(1),
        num_heads,
        size,
        eps,
        BLOCK=block,
        num_warps=_num_warps(block),
    )
    return out


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``reference.add_rms_norm``; both results are contiguous."""
    num_tokens, size = x_TD.shape
    out_TD, total_TD = torch.empty((2, num_tokens, size), dtype=x_TD.dtype, device=x_TD.device)
    if num_tokens:
        block = triton.next_power_of_2(size)
        _add_rms_norm_kernel[(num_tokens,)](
            x_TD,
            residual_TD,
            weight_D,
            out_TD,
            total_TD,
            x_TD.stride(0),
            residual_TD.stride(0),
            size,
            eps,
            BLOCK=block,
            num_warps=_num_warps(block),
        )
    return out_TD, total_TD


def _num_warps(block: int) -> int:
    """Sixteen bytes or more per thread and load."""
    return min(16, max(1, block // 256))
