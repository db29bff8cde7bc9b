"""What both attention kernels are made of: a tile of query rows over one split of the context, and the merge of splits.

    split:  m = max_j s_j,  l = sum_j 2^(s_j - m),  acc = sum_j 2^(s_j - m) v_j      with s = q k^T * scale * log2(e)
    merge:  m' = max(m1, m2),  l' = l1 2^(m1 - m') + l2 2^(m2 - m'),  acc' likewise;  output = acc / l

(The running softmax of Milakov and Gimelshein, 2018; split as in Dao et al., "Flash-Decoding", 2023.)

Splits and the tiles inside them begin at absolute positions, multiples of their size, and are merged in ascending
order. What a row does not see changes nothing in its (m, l, acc), bit by bit. So with one shape of tile a query's
result is the same in a prompt, in a chunk of it and when it decodes, whoever else is in the batch.

Shapes: M rows of a tile (query tokens times the query heads of one key-value head), N positions of a tile, D head size.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

SPLIT = 256  # positions; a multiple of every tile's
_LOG2_E = math.log2(math.e)


def score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """(score_scale, cap) that turn ``q k^T`` into scores to the base 2: ``scale * log2(e)`` alone, or what
    ``softcap * tanh(q k^T * scale / softcap) * log2(e)`` takes when tanh is written with exp2."""
    if softcap:
        return 2 * _LOG2_E * scale / softcap, softcap * _LOG2_E
    return scale * _LOG2_E, 0.0


@triton.jit
def attend_split(
    q_MD, row_positions_M, kv_ptr, table_ptr, stride_kv, stride_block, stride_slot, begin, end, score_scale, cap,
    head_dim,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(m_M, l_M, acc_MD) float32 over the positions from ``begin``, a multiple of BLOCK_N, to ``end``.

    Row i sees positions up to ``row_positions_M[i]``, the last WINDOW of them where WINDOW is not 0; -1: none.
    ``score_scale`` and ``cap`` are those of ``score_factors``.
    """
    m_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_M = tl.zeros((BLOCK_M,), tl.float32)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    column = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        position_N = start + tl.arange(0, BLOCK_N)
        held_N = position_N < end
        block_N = tl.load(table_ptr + position_N // BLOCK_SIZE, mask=held_N, other=0).to(tl.int64)
        offset_N = block_N * stride_block + position_N % BLOCK_SIZE * stride_slot
        inside_ND = held_N[:, None] & (column < head_dim)[None, :]
        source_ND = kv_ptr + offset_N[:, None] + column[None, :]
        k_ND = tl.load(source_ND, mask=inside_ND, other=0.0)
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * score_scale
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1), which saturates where the exponential overflows.
            scores_MN = cap * (1.0 - 2.0 / (tl.exp2(scores_MN) + 1.0))
        seen_MN = position_N[None, :] <= row_positions_M[:, None]
        if WINDOW > 0:
            seen_MN = seen_MN & (position_N[None, :] > row_positions_M[:, None] - WINDOW)
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
        peak_M = tl.maximum(m_M, tl.max(scores_MN, axis=1))
        shift_M = tl.where(peak_M == float("-inf"), 0.0, peak_M)
        weights_MN = tl.exp2(scores_MN - shift_M[:, None])
        fade_M = tl.exp2(m_M - shift_M)
        v_ND = tl.load(source_ND + stride_kv, mask=inside_ND, other=0.0)
        l_M = tl.fma(l_M, fade_M, tl.sum(weights_MN, axis=1))
        acc_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, acc_MD * fade_M[:, None], input_precision="ieee")
        m_M = peak_M
    return m_M, l_M, acc_MD


@triton.jit
def merge_split(m_M, l_M, acc_MD, split_m_M, split_l_M, split_acc_MD):
    """The state with one more split. Multiply-adds are spelled out: the compiler must not choose them per kernel."""
    peak_M = tl.maximum(m_M, split_m_M)
    shift_M = tl.where(peak_M == float("-inf"), 0.0, peak_M)
    fade_M, share_M = tl.exp2(m_M - shift_M), tl.exp2(split_m_M - shift_M)
    l_M = tl.fma(split_l_M, share_M, l_M * fade_M)
    share_MD = tl.broadcast_to(share_M[:, None], acc_MD.shape)
    acc_MD = tl.fma(split_acc_MD, share_MD, acc_MD * fade_M[:, None])
    return peak_M, l_M, acc_MD


@triton.jit
def normalised(l_M, acc_MD):
    """The output of a finished state; zeros for rows that saw nothing."""
    return acc_MD / tl.where(l_M == 0.0, 1.0, l_M)[:, None]
