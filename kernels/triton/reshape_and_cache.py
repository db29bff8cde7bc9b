"""A step's keys and values go to their slots of the paged cache:

    kv_cache[0, slot // block_size, slot % block_size] = k,   kv_cache[1, ...] = v

Shapes: T tokens, G key-value heads, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def finite(value):
    """float16 values beyond its range, as the nearest that are in it, and NaN as zero.

    A block outlives the sequence that overflowed, and its next owner hides old slots by weights of zero, which do not
    silence an infinity. The other types reach as far as float32.
    """
    if value.dtype == tl.float16:
        wide = value.to(tl.float32)
        wide = tl.where(wide == wide, tl.minimum(tl.maximum(wide, -65504.0), 65504.0), 0.0)
        value = wide.to(tl.float16)
    return value


@triton.jit
def _reshape_and_cache_kernel(
    k_ptr, v_ptr, kv_cache_ptr, slot_mapping_ptr,
    stride_k_token, stride_k_head, stride_v_token, stride_v_head, stride_kv, num_heads, head_dim,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot >= 0:
        head = tl.arange(0, BLOCK_G)[:, None]
        column = tl.arange(0, BLOCK_D)[None, :]
        inside = (head < num_heads) & (column < head_dim)
        target = kv_cache_ptr + (slot * num_heads + head) * head_dim + column
        k = tl.load(k_ptr + token * stride_k_token + head * stride_k_head + column, mask=inside, other=0.0)
        v = tl.load(v_ptr + token * stride_v_token + head * stride_v_head + column, mask=inside, other=0.0)
        tl.store(target, finite(k.to(kv_cache_ptr.dtype.element_ty)), mask=inside)
        tl.store(target + stride_kv, finite(v.to(kv_cache_ptr.dtype.element_ty)), mask=inside)


def reshape_and_cache(k_TGD: Tensor, v_TGD: Tensor, kv_cache: Tensor, slot_mapping_T: Tensor) -> None:
    """As ``reference.reshape_and_cache``; a negative slot stores nothing (padding of a captured batch).

    Args:
        k_TGD, v_TGD: slices of a packed projection are fine: only D must have a unit stride.
        kv_cache: contiguous.
    """
    num_tokens, num_heads, head_dim = k_TGD.shape
    if num_tokens:
        _reshape_and_cache_kernel[(num_tokens,)](
            k_TGD,
            v_TGD,
            kv_cache,
            slot_mapping_T,
            k_TGD.stride(0),
            k_TGD.stride(1),
            v_TGD.stride(0),
            v_TGD.stride(1),
            kv_cache.stride(0),
            num_heads,
            head_dim,
            BLOCK_G=triton.next_power_of_2(num_heads),
            BLOCK_D=triton.next_power_of_2(head_dim),
        )
