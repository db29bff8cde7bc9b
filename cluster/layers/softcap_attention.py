"""Paged attention with capped scores (Gemma 2): ``softmax(cap * tanh(q k^T * scale / cap)) v``.

torch's fused attention has no cap, so the scores are written out, in float32. The plan, its masks and the cache are
those of ``kernels.paged_attention``.

Shapes: T tokens of the step, S sequences of a group, Q query tokens of each, L gathered positions, H query heads, G
key-value heads, R = H / G, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster import kernels


def softcap_attention(
    q_THD: Tensor, kv_cache: Tensor, groups: list[kernels.AttentionGroup], *, scale: float, softcap: float
) -> Tensor:
    """Gives (T, H, D) in the queries' dtype. The step's keys and values are already in ``kv_cache``."""
    return torch.cat([_group(q_THD[group.start : group.stop], kv_cache, group, scale, softcap) for group in groups])


def _group(q_THD: Tensor, kv_cache: Tensor, group: kernels.AttentionGroup, scale: float, softcap: float) -> Tensor:
    num_kv_heads, head_dim = kv_cache.shape[3:]
    blocks = kv_cache.index_select(1, group.block_ids)
    kv_SLGD = blocks.view(2, group.num_seqs, -1, num_kv_heads, head_dim)[:, :, : group.num_positions]
    k_SG1LD, v_SG1LD = kv_SLGD.transpose(2, 3).unsqueeze(3).float().unbind()
    q_SQGRD = q_THD.view(group.num_seqs, -1, num_kv_heads, q_THD.shape[1] // num_kv_heads, head_dim)
    q_SGRQD = q_SQGRD.permute(0, 2, 3, 1, 4).float()
    scores_SGRQL = softcap * torch.tanh(q_SGRQD @ k_SG1LD.transpose(-1, -2) * (scale / softcap))
    if group.mask is not None:
        # (S, 1, 1, L) for decodes, (Q, L) for a chunk.
        scores_SGRQL += group.mask.unsqueeze(1) if group.mask.dim() == 4 else group.mask
    elif group.is_causal:
        num_queries, num_positions = scores_SGRQL.shape[-2:]
        hidden_QL = torch.ones(num_queries, num_positions, dtype=torch.bool, device=q_THD.device).triu_(1)
        scores_SGRQL.masked_fill_(hidden_QL, float("-inf"))
    out_SGRQD = scores_SGRQL.softmax(dim=-1) @ v_SG1LD
    return out_SGRQD.permute(0, 3, 1, 2, 4).reshape(q_THD.shape).to(q_THD.dtype)
