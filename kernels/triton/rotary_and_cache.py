"""Rotary embedding of queries and keys, fused with the write of keys and values to the paged cache.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)     for the halves x1, x2 of every query and key head
    kv_cache[0, slot] = rotated key,   kv_cache[1, slot] = value

Queries are rotated in place; rotated keys exist in the cache alone.

Shapes: T tokens, N = H + 2G heads of the packed projection, H query heads, G key-value heads, D head size, R = D / 2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cluster.kernels.triton.reshape_and_cache import finite

_HEADS_PER_PROGRAM = 8


@triton.jit
def _rotary_and_cache_kernel(
    qkv_ptr, cos_ptr, sin_ptr, kv_cache_ptr, slot_mapping_ptr,
    stride_token, stride_head, stride_cos, stride_sin, stride_kv, num_heads, num_kv_heads, half,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    column = tl.arange(0, BLOCK_R)[None, :]
    inside = (head < num_heads + 2 * num_kv_heads) & (column < half)
    is_query = head < num_heads
    is_value = head >= num_heads + num_kv_heads

    source = qkv_ptr + token * stride_token + head * stride_head + column
    x1 = tl.load(source, mask=inside, other=0.0)
    x2 = tl.load(source + half, mask=inside, other=0.0)
    turns = column < half
    cos = tl.load(cos_ptr + token * stride_cos + column, mask=turns, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * stride_sin + column, mask=turns, other=0.0).to(tl.float32)
    w1, w2 = x1.to(tl.float32), x2.to(tl.float32)
    y1 = (w1 * cos - w2 * sin).to(x1.dtype)
    y2 = (w2 * cos + w1 * sin).to(x1.dtype)

    tl.store(source, y1, mask=inside & is_query)
    tl.store(source + half, y2, mask=inside & is_query)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot >= 0:
        kv_head = tl.where(is_value, head - num_heads - num_kv_heads, head - num_heads)
        target = kv_cache_ptr + is_value * stride_kv + (slot * num_kv_heads + kv_head) * (2 * half) + column
        stored = inside & (head >= num_heads)
        element = kv_cache_ptr.dtype.element_ty
        tl.store(target, finite(tl.where(is_value, x1, y1).to(element)), mask=stored)
        tl.store(target + half, finite(tl.where(is_value, x2, y2).to(element)), mask=stored)


def rotary_and_cache(
    qkv_TND: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    kv_cache: Tensor,
    slot_mapping_T: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """As ``reference.rotary_and_cache``; gives the queries (T, H, D), a view of ``qkv_TND``, which is changed.

    Args:
        qkv_TND: query heads, then key heads, then value heads; D has a unit stride.
        kv_cache: (2, num_blocks, block_size, G, D), contiguous.
        slot_mapping_T: a negative slot stores nothing (padding of a captured batch).
    """
    num_tokens, total_heads, head_dim = qkv_TND.shape
    if num_tokens:
        _rotary_and_cache_kernel[(num_tokens, triton.cdiv(total_heads, _HEADS_PER_PROGRAM))](
            qkv_TND,
            cos_TR,
            sin_TR,
            kv_cache,
            slot_mapping_T,
            qkv_TND.stride(0),
            qkv_TND.stride(1),
            cos_TR.stride(0),
            sin_TR.stride(0),
            kv_cache.stride(0),
            num_heads,
            num_kv_heads,
            head_dim // 2,
            BLOCK_N=_HEADS_PER_PROGRAM,
            BLOCK_R=triton.next_power_of_2(head_dim // 2),
        )
    return qkv_TND[:, :num_heads]
