"""Paged attention of the torch backend: blocks are gathered, then torch's own fused attention runs on them.

What depends only on lengths and block tables (groups, gather indices, masks) is planned once a step and used by every
layer. Sequences that decode one token are computed together, padded to the longest of their group; a prompt's chunk is
computed alone.

Shapes: T tokens of a step, S sequences of a group, B blocks gathered per sequence, L = B * block_size gathered
positions, Q query tokens of one sequence, H query heads, G key-value heads, R = H / G, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Positions that one group of decodes may gather. On a CPU more than a few megabytes leave the cache, and from 32 MiB on
# the C library maps fresh pages for every layer (measured: 6 times slower at 64 sequences of 800); elsewhere it bounds
# the memory.
_MAX_POSITIONS = {"cpu": 2048}
_MAX_POSITIONS_ELSEWHERE = 2**16


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Sequences computed by one call.

    Attributes:
        start, stop: their tokens in the step.
        num_seqs: 1, or several of one query token each.
        block_ids: (num_seqs * B,) int64, the blocks to gather.
        num_positions: gathered positions that are looked at, at most L.
        mask: additive, (S, 1, 1, L) for decodes and (Q, L) for a chunk; None where nothing needs hiding.
        is_causal: whether the plain causal triangle does; only without a mask.
    """

    start: int
    stop: int
    num_seqs: int
    block_ids: Tensor
    num_positions: int
    mask: Tensor | None
    is_causal: bool


def plan_attention(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables_SB: np.ndarray,
    *,
    block_size: int,
    sliding_window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> list[AttentionGroup]:
    """The groups of one step for layers with this ``sliding_window``.

    Neighbours that decode are grouped while their contexts differ by at most a factor of two, so that padding never
    more than doubles the work, and while what they gather stays small. Callers get the fewest groups by ordering
    decodes by context length.

    Args:
        query_lens, context_lens: tokens per sequence in this step, and positions up to the last of them.
        block_tables_SB: (S, B) int block ids on the CPU, padded on the right with anything.
    """
    first_blocks = _first_blocks(query_lens, context_lens, block_size, sliding_window)
    num_blocks = [-(-context // block_size) - first for context, first in zip(context_lens, first_blocks, strict=True)]
    max_blocks = _MAX_POSITIONS.get(device.type, _MAX_POSITIONS_ELSEWHERE) // block_size
    groups, token, index = [], 0, 0
    while index < len(query_lens):
        end = index + 1
        if query_lens[index] == 1:
            shortest = longest = num_blocks[index]
            while end < len(query_lens) and query_lens[end] == 1:
                shortest, longest = min(shortest, num_blocks[end]), max(longest, num_blocks[end])
                if longest > 2 * shortest or longest * (end + 1 - index) > max_blocks:
                    break
                end += 1
        members = slice(index, end)
        width = max(num_blocks[members])
        ids_SB = np.zeros((end - index, width), dtype=np.int64)
        for row, (first, count) in enumerate(zip(first_blocks[members], num_blocks[members], strict=True)):
            ids_SB[row, :count] = block_tables_SB[index + row, first : first + count]
        stop = token + sum(query_lens[members])
        ends = [c - f * block_size for c, f in zip(context_lens[members], first_blocks[members], strict=True)]
        mask, is_causal = _mask(query_lens[index], ends, sliding_window, dtype, device)
        groups.append(
            AttentionGroup(
                start=token,
                stop=stop,
                num_seqs=end - index,
                block_ids=torch.from_numpy(ids_SB.ravel()).to(device),
                num_positions=max(ends),
                mask=mask,
                is_causal=is_causal,
            )
        )
        token, index = stop, end
    return groups


def _first_blocks(
    query_lens: Sequence[int], context_lens: Sequence[int], block_size: int, sliding_window: int | None
) -> list[int]:
    """Per sequence the first block that any of its queries can see."""
    if sliding_window is None:
        return [0] * len(query_lens)
    return [
        max(0, context - query - sliding_window + 1) // block_size
        for query, context in zip(query_lens, context_lens, strict=True)
    ]


def _mask(
    query_len: int, ends: list[int], sliding_window: int | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, bool]:
    """(additive mask, is_causal) of a group whose sequences end at the gathered positions ``ends``."""
    num_positions = max(ends)
    if query_len == 1:
        windowed = sliding_window is not None and num_positions > sliding_window
        if min(ends) == num_positions and not windowed:
            return None, False
        query_Q1 = torch.tensor(ends)[:, None] - 1
    else:
        windowed = sliding_window is not None and num_positions > sliding_window
        if query_len == num_positions and not windowed:
            return None, True
        query_Q1 = torch.arange(num_positions - query_len, num_positions)[:, None]
    key_1L = torch.arange(num_positions)[None, :]
    hidden_QL = key_1L > query_Q1
    if sliding_window is not None:
        hidden_QL |= key_1L <= query_Q1 - sliding_window
    # Additive and of the queries' dtype: torch would otherwise convert a boolean mask again in every layer.
    mask_QL = torch.zeros(hidden_QL.shape, dtype=dtype).masked_fill_(hidden_QL, float("-inf")).to(device)
    return (mask_QL[:, None, None, :] if query_len == 1 else mask_QL), False


def paged_attention(
    q_THD: Tensor, kv_cache: Tensor, groups: Sequence[AttentionGroup], *, scale: float, softcap: float = 0.0
) -> Tensor:
    """As ``reference.paged_attention``, with lengths, tables and window in the plan; gives (T, H, D)."""
    if len(groups) == 1:
        return _group_attention(q_THD, kv_cache, groups[0], scale, softcap)
    return torch.cat([_group_attention(q_THD[g.start : g.stop], kv_cache, g, scale, softcap) for g in groups])


def _group_attention(q_THD: Tensor, kv_cache: Tensor, group: AttentionGroup, scale: float, softcap: float) -> Tensor:
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = kv_cache.shape[3]
    blocks = kv_cache.index_select(1, group.block_ids).to(q_THD.dtype)
    kv_SLGD = blocks.view(2, group.num_seqs, -1, num_kv_heads, head_dim)[:, :, : group.num_positions]
    if group.mask is not None and group.mask.dim() == 4:
        # Blocks of shorter sequences end with what others left there; hidden NaN would still be NaN.
        kv_SLGD.masked_fill_(group.mask[:, 0, 0, :, None, None].isinf(), 0.0)
    k_SGLD, v_SGLD = kv_SLGD.transpose(2, 3).unbind()
    if softcap:
        return _capped_attention(q_THD, k_SGLD, v_SGLD, group, scale, softcap)
    if num_tokens == group.num_seqs:
        # The R query heads that share a key-value head stand in as its queries: no head is ever repeated.
        q_SGRD = q_THD.reshape(num_tokens, num_kv_heads, -1, head_dim)
        out_SGRD = F.scaled_dot_product_attention(q_SGRD, k_SGLD, v_SGLD, attn_mask=group.mask, scale=scale)
        return out_SGRD.reshape(num_tokens, num_heads, head_dim)
    # One sequence: key-value heads stand in as the batch, expanded without a copy over the R query heads.
    q_GRQD = q_THD.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    k_GRLD = k_SGLD[0, :, None].expand(-1, q_GRQD.shape[1], -1, -1)
    v_GRLD = v_SGLD[0, :, None].expand(-1, q_GRQD.shape[1], -1, -1)
    out_GRQD = F.scaled_dot_product_attention(
        q_GRQD, k_GRLD, v_GRLD, attn_mask=group.mask, is_causal=group.is_causal, scale=scale
    )
    return out_GRQD.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def _capped_attention(
    q_THD: Tensor, k_SGLD: Tensor, v_SGLD: Tensor, group: AttentionGroup, scale: float, softcap: float
) -> Tensor:
    """``softmax(cap * tanh(q k^T * scale / cap)) v`` (Gemma 2). torch's fused attention has no cap, so the scores are
    written out, in float32."""
    num_kv_heads, head_dim = k_SGLD.shape[1], k_SGLD.shape[3]
    k_SG1LD, v_SG1LD = k_SGLD.unsqueeze(2).float(), v_SGLD.unsqueeze(2).float()
    q_SQGRD = q_THD.reshape(group.num_seqs, -1, num_kv_heads, q_THD.shape[1] // num_kv_heads, head_dim)
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
