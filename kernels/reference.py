"""The truth for every op: its formula in plain torch, float32 inside, no care for speed. Other backends are tested
against these.

Shapes: T tokens of a step, S its sequences, B blocks of the longest table, D hidden or head size, F intermediate size,
H query heads, G key-value heads (H is a multiple of G), N heads of either kind, L context length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019), in x's dtype."""
    x = x_TD.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight_D.float()).to(x_TD.dtype)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``: the seam between two sub-layers."""
    total_TD = x_TD + residual_TD
    return rms_norm(total_TD, weight_D, eps), total_TD


def rotary(x_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """``(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`` with x1, x2 the halves of a head (Su et al., 2021).

    ``cos_T1D`` repeats its half; the first half of ``sin_T1D`` is negated, so that the formula is one multiply-add:
    ``x * cos + swap_halves(x) * sin``.
    """
    x1, x2 = x_TND.float().chunk(2, dim=-1)
    return (x_TND.float() * cos_T1D.float() + torch.cat((x2, x1), dim=-1) * sin_T1D.float()).to(x_TND.dtype)


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """``silu(gate) * up`` of a tensor (T, 2F) that holds the gates first; gives (T, F) (SwiGLU: Shazeer, 2020)."""
    gate_TF, up_TF = gate_up_TF.float().chunk(2, dim=-1)
    return (gate_TF / (1 + torch.exp(-gate_TF)) * up_TF).to(gate_up_TF.dtype)


def reshape_and_cache(k_TGD: Tensor, v_TGD: Tensor, kv_cache: Tensor, slot_mapping_T: Tensor) -> None:
    """Token t's key and value go to slot ``slot_mapping_T[t]`` of ``kv_cache`` (2, num_blocks, block_size, G, D).

    Slot ``block * block_size + offset`` is position ``offset`` of that block. Mutates ``kv_cache``.
    """
    block_size = kv_cache.shape[2]
    for index, slot in enumerate(slot_mapping_T.tolist()):
        kv_cache[0, slot // block_size, slot % block_size] = k_TGD[index]
        kv_cache[1, slot // block_size, slot % block_size] = v_TGD[index]


def paged_attention(
    q_THD: Tensor,
    kv_cache: Tensor,
    block_tables_SB: Tensor,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """``softmax(q k^T * scale) v`` of every sequence over its own blocks, causal; gives (T, H, D).

    Args:
        q_THD: the sequences' query tokens one after the other; a sequence's last query is its last context position.
        kv_cache: (2, num_blocks, block_size, G, D); keys and values of the queries are already in it.
        block_tables_SB: block ids of each sequence, padded on the right with anything.
        query_lens, context_lens: per sequence; the context includes the queries.
        sliding_window: a query sees this many positions, its own included; None: all before it.
        softcap: scores ``s`` become ``softcap * tanh(s / softcap)`` (Gemma 2); 0: they stay.
    """
    num_heads, num_kv_heads = q_THD.shape[1], kv_cache.shape[3]
    outputs, start = [], 0
    for table_B, query_len, context_len in zip(block_tables_SB, query_lens, context_lens, strict=True):
        k_LGD, v_LGD = kv_cache[:, table_B.long()].flatten(1, 2)[:, :context_len].float()
        k_LHD = k_LGD.repeat_interleave(num_heads // num_kv_heads, dim=1)
        v_LHD = v_LGD.repeat_interleave(num_heads // num_kv_heads, dim=1)
        q_QHD = q_THD[start : start + query_len].float()
        scores_HQL = torch.einsum("qhd,lhd->hql", q_QHD, k_LHD) * scale
        if softcap:
            scores_HQL = softcap * torch.tanh(scores_HQL / softcap)
        query_Q1 = torch.arange(context_len - query_len, context_len, device=q_THD.device)[:, None]
        key_1L = torch.arange(context_len, device=q_THD.device)[None, :]
        hidden_QL = key_1L > query_Q1
        if sliding_window is not None:
            hidden_QL |= key_1L <= query_Q1 - sliding_window
        probabilities_HQL = scores_HQL.masked_fill(hidden_QL, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hql,lhd->qhd", probabilities_HQL, v_LHD))
        start += query_len
    return torch.cat(outputs).to(q_THD.dtype)


def rotary_and_cache(
    qkv_TND: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    kv_cache: Tensor,
    slot_mapping_T: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """``(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`` of query and key heads; keys and values go to the cache.

    Args:
        qkv_TND: N = H + 2G heads: queries, keys, values. A backend may change it.
        cos_TR, sin_TR: R = D / 2 angles of each token's position.
        kv_cache, slot_mapping_T: as in ``reshape_and_cache``.

    Returns:
        The rotated queries (T, H, D).
    """
    x1, x2 = qkv_TND[:, : num_heads + num_kv_heads].float().chunk(2, dim=-1)
    cos_T1R, sin_T1R = cos_TR.float()[:, None], sin_TR.float()[:, None]
    turned_TND = torch.cat((x1 * cos_T1R - x2 * sin_T1R, x2 * cos_T1R + x1 * sin_T1R), dim=-1).to(qkv_TND.dtype)
    q_THD, k_TGD = turned_TND.split((num_heads, num_kv_heads), dim=1)
    reshape_and_cache(k_TGD, qkv_TND[:, num_heads + num_kv_heads :], kv_cache, slot_mapping_T)
    return q_THD
