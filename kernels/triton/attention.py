"""The attention of a step: its plan, made once a step from lengths and block tables, and the call that runs it.

Sequences that compute one token go to ``paged_decode``, all others to ``paged_prefill``, or to FlashAttention.

Shapes: S sequences, B blocks of the longest table, T tokens, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.kernels.triton.attention_split import SPLIT
from cluster.kernels.triton.flash_prefill import flash_attention, flash_prefill, takes
from cluster.kernels.triton.paged_decode import DecodePlan, paged_decode
from cluster.kernels.triton.paged_prefill import PrefillPlan, paged_prefill
from cluster.kernels.triton.staging import to_device
from cluster.kernels.triton.tiles import decode_tile, prefill_tile


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What the layers with one sliding window share in a step; either part may be missing."""

    decode: DecodePlan | None
    prefill: PrefillPlan | None
    sliding_window: int | None
    batch_invariant: bool


def plan_attention(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables_SB: np.ndarray,
    *,
    block_size: int,
    sliding_window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    batch_invariant: bool,
) -> AttentionPlan:
    """Sorts the step's sequences to their kernels and copies what these read to the device, without waiting for it.

    Args:
        query_lens, context_lens: tokens per sequence in this step, and positions up to the last of them.
        block_tables_SB: (S, B) int block ids on the CPU, padded on the right with anything.
        block_size, dtype: part of every backend's signature; these kernels read them off the cache.
    """
    query_lens_S, context_lens_S = np.asarray(query_lens), np.asarray(context_lens)
    token_starts_S = np.cumsum(query_lens_S) - query_lens_S
    decodes, chunks = np.flatnonzero(query_lens_S == 1), np.flatnonzero(query_lens_S > 1)
    decode_contexts = context_lens_S[decodes]
    num_splits = -(-decode_contexts // SPLIT)
    query_starts = np.concatenate(([0], np.cumsum(query_lens_S[chunks])))
    arrays = (
        token_starts_S[decodes],
        decode_contexts,
        np.cumsum(num_splits) - num_splits,
        block_tables_SB[decodes],
        token_starts_S[chunks],
        query_starts,
        context_lens_S[chunks],
        block_tables_SB[chunks],
    )
    on_device = to_device([array.astype(np.int32) for array in arrays], device)
    decode = prefill = None
    if len(decodes):
        decode = DecodePlan(*on_device[:4], num_splits=int(num_splits.sum()), max_splits=int(num_splits.max()))
    if len(chunks):
        first_token = int(token_starts_S[chunks[0]])
        side_by_side = bool((token_starts_S[chunks] - first_token == query_starts[:-1]).all())
        prefill = PrefillPlan(
            *on_device[4:],
            num_tokens=int(query_starts[-1]),
            max_query_len=int(query_lens_S.max()),
            first_token=first_token if side_by_side else None,
        )
    return AttentionPlan(decode, prefill, sliding_window, batch_invariant)


def paged_attention(
    q_THD: Tensor, kv_cache: Tensor, plan: AttentionPlan, *, scale: float, softcap: float = 0.0
) -> Tensor:
    """As ``reference.paged_attention``, with lengths, tables and window in the plan; gives (T, H, D)."""
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    options = {"scale": scale, "softcap": softcap, "sliding_window": plan.sliding_window}
    invariant = plan.batch_invariant
    if plan.decode is not None:
        tile = decode_tile(kv_cache.dtype, batch_invariant=invariant)
        paged_decode(q_THD, kv_cache, plan.decode, out_THD, tile=tile, **options)
    if plan.prefill is None:
        return out_THD
    if not invariant and takes(q_THD, kv_cache, plan.prefill):
        flash_prefill(q_THD, kv_cache, plan.prefill, out_THD, attend=flash_attention(), **options)
    else:
        tile = prefill_tile(kv_cache.dtype, batch_invariant=invariant)
        paged_prefill(q_THD, kv_cache, plan.prefill, out_THD, tile=tile, **options)
    return out_THD
