"""Paged attention of prompts and their chunks: ``softmax(q k^T * scale) v`` over what the cache holds of a sequence,
its chunk included, causal.

A tile of rows holds neighbouring tokens times the query heads that share a key-value head, so a block of keys is read
once for all of them. It walks its splits in ascending order and merges as it goes: the same order, sizes and formulas
as in ``paged_decode``.

Shapes: S sequences, B blocks of the longest table, H query heads, G key-value heads, R = H / G, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from cluster.kernels.triton.attention_split import SPLIT, attend_split, merge_split, normalised, score_factors
from cluster.kernels.triton.tiles import AttentionTile


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The sequences of a step that compute several tokens. All tensors are int32 on the device.

    Attributes:
        token_starts_S: where in the step each sequence's tokens begin.
        query_starts_S1: where they begin among the tokens of these sequences; one more, the sum, at the end.
        context_lens_S: positions up to its last token.
        block_tables_SB: padded on the right with anything.
        num_tokens: of these sequences together.
        max_query_len: the most tokens of one of them.
        first_token: where their tokens begin in the step, if they lie side by side; else None.
    """

    token_starts_S: Tensor
    query_starts_S1: Tensor
    context_lens_S: Tensor
    block_tables_SB: Tensor
    num_tokens: int
    max_query_len: int
    first_token: int | None


@triton.jit(do_not_specialize=["stride_table", "num_seqs"])
def _prefill_kernel(
    q_ptr, kv_cache_ptr, token_starts_ptr, query_starts_ptr, context_lens_ptr, tables_ptr, out_ptr,
    stride_q_token, stride_q_head, stride_kv, stride_block, stride_slot, stride_table,
    score_scale, cap, num_seqs, num_rows, head_dim,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Late tiles see most: they are started first.
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    # Sequence s owns the tiles from query_starts[s] // TOKENS + s on, which leaves each enough of them.
    sequence, beyond = 0, num_seqs
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        owns = tl.load(query_starts_ptr + middle) // TOKENS + middle <= tile
        sequence = tl.where(owns, middle, sequence)
        beyond = tl.where(owns, beyond, middle)
    query_start = tl.load(query_starts_ptr + sequence)
    query_len = tl.load(query_starts_ptr + sequence + 1) - query_start
    first_token = (tile - query_start // TOKENS - sequence) * TOKENS
    if first_token >= query_len:
        return
    context_len = tl.load(context_lens_ptr + sequence)
    row_M, column_D = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token_M = first_token + row_M // num_rows
    valid_M = (row_M < TOKENS * num_rows) & (token_M < query_len)
    row_positions_M = tl.where(valid_M, context_len - query_len + token_M, -1)
    inside_MD = valid_M[:, None] & (column_D < head_dim)[None, :]
    step_token_M = (tl.load(token_starts_ptr + sequence) + token_M).to(tl.int64)
    head_M = kv_head * num_rows + row_M % num_rows
    q_source = q_ptr + (step_token_M * stride_q_token + head_M * stride_q_head)[:, None] + column_D[None, :]
    q_MD = tl.load(q_source, mask=inside_MD, other=0.0).to(kv_cache_ptr.dtype.element_ty)

    first_position = context_len - query_len + first_token
    end = tl.minimum(first_position + TOKENS, context_len)
    first_seen = 0
    if WINDOW > 0:
        first_seen = tl.maximum(first_position + 1 - WINDOW, 0)
    m_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_M = tl.zeros((BLOCK_M,), tl.float32)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in range(first_seen // SPLIT, tl.cdiv(end, SPLIT)):
        begin = tl.maximum(split * SPLIT, first_seen // BLOCK_N * BLOCK_N)
        split_m_M, split_l_M, split_acc_MD = attend_split(
            q_MD, row_positions_M, kv_cache_ptr + kv_head * head_dim, tables_ptr + sequence * stride_table,
            stride_kv, stride_block, stride_slot, begin, tl.minimum((split + 1) * SPLIT, end),
            score_scale, cap, head_dim,
            BLOCK_SIZE, WINDOW, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        m_M, l_M, acc_MD = merge_split(m_M, l_M, acc_MD, split_m_M, split_l_M, split_acc_MD)
    num_heads = num_rows * tl.num_programs(1)
    target = out_ptr + ((step_token_M * num_heads + head_M) * head_dim)[:, None] + column_D[None, :]
    tl.store(target, normalised(l_M, acc_MD).to(out_ptr.dtype.element_ty), mask=inside_MD)


def paged_prefill(
    q_THD: Tensor,
    kv_cache: Tensor,
    plan: PrefillPlan,
    out_THD: Tensor,
    *,
    scale: float,
    softcap: float,
    sliding_window: int | None,
    tile: AttentionTile,
) -> None:
    """Fills the rows of ``out_THD`` that the plan names, as ``reference.paged_attention`` computes them.

    Args:
        q_THD: any strides but a unit one for D.
        kv_cache: (2, num_blocks, block_size, G, D), contiguous; the step's keys and values are in it.
        out_THD: contiguous.
    """
    num_heads, head_dim = q_THD.shape[1:]
    num_seqs, num_rows = len(plan.token_starts_S), num_heads // kv_cache.shape[3]
    block_m = max(tile.rows, triton.next_power_of_2(num_rows))
    tokens_per_tile = block_m // num_rows
    _prefill_kernel[(plan.num_tokens // tokens_per_tile + num_seqs, kv_cache.shape[3])](
        q_THD,
        kv_cache,
        plan.token_starts_S,
        plan.query_starts_S1,
        plan.context_lens_S,
        plan.block_tables_SB,
        out_THD,
        q_THD.stride(0),
        q_THD.stride(1),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        plan.block_tables_SB.stride(0),
        *score_factors(scale, softcap),
        num_seqs,
        num_rows,
        head_dim,
        BLOCK_SIZE=kv_cache.shape[2],
        WINDOW=sliding_window or 0,
        SOFTCAP=softcap != 0.0,
        SPLIT=SPLIT,
        TOKENS=tokens_per_tile,
        BLOCK_M=block_m,
        BLOCK_N=tile.positions,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,  # as in paged_decode: equal bits need equal roundings
    )
