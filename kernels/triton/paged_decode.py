"""Paged attention of sequences that compute one token: ``softmax(q k^T * scale) v`` over a sequence's blocks.

Few queries and long contexts: the context is divided among programs. Each computes whole splits of SPLIT positions and
stores their (m, l, acc); a second kernel merges a sequence's splits in ascending order. How many programs share a
sequence decides who computes a split and never what comes out, so it may follow the batch.

Shapes: S sequences, B blocks of the longest table, H query heads, G key-value heads, R = H / G (the rows of a tile), D
head size, P splits of all sequences together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cluster.kernels.triton.attention_split import SPLIT, attend_split, merge_split, normalised, score_factors
from cluster.kernels.triton.tiles import AttentionTile

_PROGRAMS = 1024  # several for each multiprocessor of a large device, so that uneven lengths even out


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The sequences of a step that compute one token each. All tensors are int32 on the device.

    Attributes:
        tokens_S: where in the step each sequence's token is.
        context_lens_S: positions up to that token, its own included; 0: no sequence (padding), its result is zeros.
        split_starts_S: where its splits lie among those of all.
        block_tables_SB: padded on the right with anything.
        num_splits: of all sequences together, at least.
        max_splits: of one sequence, at least.
    """

    tokens_S: Tensor
    context_lens_S: Tensor
    split_starts_S: Tensor
    block_tables_SB: Tensor
    num_splits: int
    max_splits: int


@triton.jit(do_not_specialize=["stride_table", "num_programs"])
def _decode_kernel(
    q_ptr, kv_cache_ptr, tokens_ptr, context_lens_ptr, split_starts_ptr, tables_ptr, ml_ptr, acc_ptr,
    stride_q_token, stride_q_head, stride_kv, stride_block, stride_slot, stride_table,
    score_scale, cap, num_programs, num_rows, head_dim,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens_ptr + sequence)
    first_seen = 0
    if WINDOW > 0:
        first_seen = tl.maximum(context_len - WINDOW, 0)
    first_split = first_seen // SPLIT
    last_split = tl.cdiv(context_len, SPLIT)
    token = tl.load(tokens_ptr + sequence).to(tl.int64)
    split_start = tl.load(split_starts_ptr + sequence).to(tl.int64)
    row_M, column_D = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    head_M = kv_head * num_rows + row_M
    inside_MD = (row_M < num_rows)[:, None] & (column_D < head_dim)[None, :]
    q_source = q_ptr + token * stride_q_token + head_M[:, None] * stride_q_head + column_D[None, :]
    q_MD = tl.load(q_source, mask=inside_MD, other=0.0).to(kv_cache_ptr.dtype.element_ty)
    row_positions_M = tl.where(row_M < num_rows, context_len - 1, -1)
    num_heads = num_rows * tl.num_programs(1)
    for split in range(first_split + program, last_split, num_programs):
        begin = tl.maximum(split * SPLIT, first_seen // BLOCK_N * BLOCK_N)
        m_M, l_M, acc_MD = attend_split(
            q_MD, row_positions_M, kv_cache_ptr + kv_head * head_dim, tables_ptr + sequence * stride_table,
            stride_kv, stride_block, stride_slot, begin, tl.minimum((split + 1) * SPLIT, context_len),
            score_scale, cap, head_dim,
            BLOCK_SIZE, WINDOW, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        place_M = (split_start + split - first_split) * num_heads + head_M
        tl.store(ml_ptr + place_M * 2, m_M, mask=row_M < num_rows)
        tl.store(ml_ptr + place_M * 2 + 1, l_M, mask=row_M < num_rows)
        tl.store(acc_ptr + place_M[:, None] * head_dim + column_D[None, :], acc_MD, mask=inside_MD)


@triton.jit
def _merge_kernel(
    ml_ptr, acc_ptr, tokens_ptr, context_lens_ptr, split_starts_ptr, out_ptr, num_rows, head_dim,
    WINDOW: tl.constexpr, SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sequence, kv_head = tl.program_id(0), tl.program_id(1)
    context_len = tl.load(context_lens_ptr + sequence)
    first_split = 0
    if WINDOW > 0:
        first_split = tl.maximum(context_len - WINDOW, 0) // SPLIT
    split_start = tl.load(split_starts_ptr + sequence).to(tl.int64)
    row_R, column_D = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    head_R = kv_head * num_rows + row_R
    inside_RD = (row_R < num_rows)[:, None] & (column_D < head_dim)[None, :]
    num_heads = num_rows * tl.num_programs(1)
    m_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    l_R = tl.zeros((BLOCK_R,), tl.float32)
    acc_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for index in range(tl.cdiv(context_len, SPLIT) - first_split):
        place_R = (split_start + index) * num_heads + head_R
        split_m_R = tl.load(ml_ptr + place_R * 2, mask=row_R < num_rows, other=float("-inf"))
        split_l_R = tl.load(ml_ptr + place_R * 2 + 1, mask=row_R < num_rows, other=0.0)
        source = acc_ptr + place_R[:, None] * head_dim + column_D[None, :]
        split_acc_RD = tl.load(source, mask=inside_RD, other=0.0)
        m_R, l_R, acc_RD = merge_split(m_R, l_R, acc_RD, split_m_R, split_l_R, split_acc_RD)
    token = tl.load(tokens_ptr + sequence).to(tl.int64)
    target = out_ptr + (token * num_heads + head_R[:, None]) * head_dim + column_D[None, :]
    tl.store(target, normalised(l_R, acc_RD).to(out_ptr.dtype.element_ty), mask=inside_RD)


def paged_decode(
    q_THD: Tensor,
    kv_cache: Tensor,
    plan: DecodePlan,
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
        tile: its rows hold the R query heads of a key-value head.
    """
    num_heads, head_dim = q_THD.shape[1:]
    num_seqs, num_kv_heads, num_rows = len(plan.tokens_S), kv_cache.shape[3], num_heads // kv_cache.shape[3]
    ml_PH2 = torch.empty((plan.num_splits, num_heads, 2), dtype=torch.float32, device=q_THD.device)
    acc_PHD = torch.empty((plan.num_splits, num_heads, head_dim), dtype=torch.float32, device=q_THD.device)
    num_programs = min(plan.max_splits, triton.cdiv(_PROGRAMS, num_seqs * num_kv_heads))
    block_d = max(16, triton.next_power_of_2(head_dim))
    _decode_kernel[(num_seqs, num_kv_heads, num_programs)](
        q_THD,
        kv_cache,
        plan.tokens_S,
        plan.context_lens_S,
        plan.split_starts_S,
        plan.block_tables_SB,
        ml_PH2,
        acc_PHD,
        q_THD.stride(0),
        q_THD.stride(1),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        plan.block_tables_SB.stride(0),
        *score_factors(scale, softcap),
        num_programs,
        num_rows,
        head_dim,
        BLOCK_SIZE=kv_cache.shape[2],
        WINDOW=sliding_window or 0,
        SOFTCAP=softcap != 0.0,
        SPLIT=SPLIT,
        BLOCK_M=max(tile.rows, triton.next_power_of_2(num_rows)),
        BLOCK_N=tile.positions,
        BLOCK_D=block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,  # as in paged_prefill: equal bits need equal roundings
    )
    _merge_kernel[(num_seqs, num_kv_heads)](
        ml_PH2,
        acc_PHD,
        plan.tokens_S,
        plan.context_lens_S,
        plan.split_starts_S,
        out_THD,
        num_rows,
        head_dim,
        WINDOW=sliding_window or 0,
        SPLIT=SPLIT,
        BLOCK_R=triton.next_power_of_2(num_rows),
        BLOCK_D=block_d,
        enable_fp_fusion=False,
    )
