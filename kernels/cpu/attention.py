"""Paged attention in C: its plan, made once a step from lengths and block tables, and the call that runs it.

A row's result is the same to the last bit alone and in any batch, however its prompt is cut, on any number of threads.

Shapes: S sequences, B blocks of the longest table, T tokens, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cluster.kernels.cpu import memory
from cluster.kernels.cpu.library import Library, Op, library

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_LANES = 16

# Element types of a KV cache, numbered as in src/kv_cache.h.
_KV_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What the layers with one sliding window share in a step.

    A call reads the arrays when it runs: what a recorded step attends to changes with them, in place.

    Attributes:
        query_starts: (S + 1,) int32, each sequence's first token in the step, and the number of tokens.
        context_lens_S: int32, positions up to the last of the sequence's tokens.
        block_tables_SB: int32.
        sliding_window: positions that a query sees, its own included; 0: all before it.
    """

    query_starts: np.ndarray
    context_lens_S: np.ndarray
    block_tables_SB: np.ndarray
    block_size: int
    sliding_window: int
    num_tokens: int = field(init=False)
    addresses: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        arrays = (self.query_starts, self.context_lens_S, self.block_tables_SB)
        object.__setattr__(self, "num_tokens", int(self.query_starts[-1]))
        object.__setattr__(self, "addresses", tuple(array.ctypes.data for array in arrays))


def plan_attention(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables_SB: np.ndarray,
    *,
    block_size: int,
    sliding_window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionPlan:
    """The plan of one step for layers with this ``sliding_window``.

    Args:
        query_lens, context_lens: tokens per sequence in this step, and positions up to the last of them.
        block_tables_SB: (S, B) int block ids, padded on the right with anything. It and ``context_lens`` are taken
            without a copy where they are contiguous int32 arrays.
        block_size: a multiple of 16.
        dtype, device: part of every backend's signature; here float32 on the CPU.

    Raises:
        ValueError: another block size, type or device.
    """
    if block_size % _LANES or dtype != torch.float32 or device.type != "cpu":
        raise ValueError(
            f"attention in C takes float32 on the CPU and blocks of a multiple of {_LANES} positions; "
            f"got {dtype} on {device} and blocks of {block_size}"
        )
    query_starts = np.zeros(len(query_lens) + 1, dtype=np.int32)
    np.cumsum(query_lens, out=query_starts[1:])
    return AttentionPlan(
        query_starts,
        np.ascontiguousarray(context_lens, dtype=np.int32),
        np.ascontiguousarray(block_tables_SB, dtype=np.int32),
        block_size,
        sliding_window or 0,
    )


def paged_attention(
    q_THD: Tensor, kv_cache: Tensor, plan: AttentionPlan, *, scale: float, softcap: float = 0.0
) -> Tensor:
    """As ``reference.paged_attention``, with lengths, tables and window in the plan; gives contiguous (T, H, D).

    Args:
        q_THD: float32; a token's queries are contiguous.
        kv_cache: (2, num_blocks, block_size, G, D) of float32, bfloat16 or float16, contiguous, filled by
            ``rotary_and_cache`` or ``reshape_and_cache``: only its blocks are where its shape says.

    Raises:
        ValueError: tensors of another shape or type.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    token_stride, head_stride, stride = q_THD.stride()
    num_blocks, num_kv_heads, kv_type = check_cache(kv_cache, plan.block_size, head_dim)
    if (
        q_THD.dtype is not torch.float32
        or num_tokens != plan.num_tokens
        or num_heads % num_kv_heads
        or stride != 1
        or head_stride != head_dim
    ):
        raise ValueError(
            f"queries must be float32 of {plan.num_tokens} tokens, a multiple of {num_kv_heads} heads each, contiguous "
            f"within a token; got {q_THD.dtype} {tuple(q_THD.shape)} of strides {q_THD.stride()}"
        )
    out_THD = memory.empty(num_tokens, num_heads, head_dim)
    query_starts, context_lens, block_tables = plan.addresses
    num_seqs, width = plan.block_tables_SB.shape
    _function()(
        q_THD.data_ptr(),
        token_stride,
        num_heads,
        kv_cache.data_ptr(),
        num_blocks,
        plan.block_size,
        num_kv_heads,
        head_dim,
        kv_type,
        query_starts,
        context_lens,
        block_tables,
        num_seqs,
        width,
        plan.sliding_window,
        scale,
        softcap,
        out_THD.data_ptr(),
    )
    return out_THD


def check_cache(kv_cache: Tensor, block_size: int, head_dim: int) -> tuple[int, int, int]:
    """(num_blocks, num_kv_heads, number of the element type) of a layer's cache.

    Raises:
        ValueError: it is not one that the kernels read.
    """
    two, num_blocks, found_block_size, num_kv_heads, found_head_dim = kv_cache.shape
    kv_type = _KV_TYPES.get(kv_cache.dtype)
    if (
        two != 2
        or found_block_size != block_size
        or block_size % _LANES
        or found_head_dim != head_dim
        or kv_type is None
        or not kv_cache.is_contiguous()
    ):
        raise ValueError(
            f"the KV cache must be a contiguous (2, blocks, {block_size}, heads, {head_dim}) of float32, bfloat16 or "
            f"float16, with blocks of a multiple of {_LANES} positions; got {kv_cache.dtype} {tuple(kv_cache.shape)}"
        )
    return num_blocks, num_kv_heads, kv_type


@cache
def _function() -> Op:
    return _bind(library())


def _bind(found: Library | None) -> Op:
    if found is None:
        raise RuntimeError("the CPU kernels are not compiled")
    pointers = (_P, _P, _P)
    return found.function("paged_attention", _P, _I, _I, _P, _I, _I, _I, _I, _I, *pointers, _I, _I, _I, _F, _F, _P)
