"""The torch backend's ops but for attention: the formulas of ``reference.py`` in as few torch calls as they take.

At small batches a step's time is the number of calls, not their arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return F.linear(x_TI, weight_OI, bias_O)


def embedding(input_ids_T: Tensor, weight_VD: Tensor, *, first_id: int | None = None) -> Tensor:
    if first_id is None:
        return F.embedding(input_ids_T, weight_VD)
    rows_T, is_foreign_T1 = held_rows(input_ids_T, first_id, len(weight_VD))
    return F.embedding(rows_T, weight_VD).masked_fill_(is_foreign_T1, 0)


def held_rows(input_ids_T: Tensor, first_id: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """(row of each id in a weight that holds ``num_rows`` ids from ``first_id`` on, any row for others; (T, 1): which
    are others)."""
    rows_T = input_ids_T - first_id
    held_T = rows_T.clamp(0, num_rows - 1)
    return held_T, (held_T != rows_T)[:, None]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    normed = F.rms_norm(x, weight_D.shape, weight_D, eps)
    return normed if out is None else out.copy_(normed)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total_TD = x_TD + residual_TD
    return F.rms_norm(total_TD, weight_D.shape, weight_D, eps), total_TD


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


def rotary_angles(
    positions_T: Tensor, frequencies_R: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    angles_TR = positions_T[:, None].float() * frequencies_R
    return (angles_TR.cos() * scale).to(dtype), (angles_TR.sin() * scale).to(dtype)


def rotary_and_cache(
    qkv_TND: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    kv_cache: Tensor,
    slot_mapping_T: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    # Queries and keys lie side by side and turn alike: one pass for both, in place.
    turning = num_heads + num_kv_heads
    x1, x2 = qkv_TND[:, :turning].chunk(2, dim=-1)
    cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
    x1_sin = x1 * sin_T1R
    x1.mul_(cos_T1R).addcmul_(x2, sin_T1R, value=-1)
    x2.mul_(cos_T1R).add_(x1_sin)
    reshape_and_cache(qkv_TND[:, num_heads:turning], qkv_TND[:, turning:], kv_cache, slot_mapping_T)
    return qkv_TND[:, :num_heads]


def reshape_and_cache(k_TGD: Tensor, v_TGD: Tensor, kv_cache: Tensor, slot_mapping_T: Tensor) -> None:
    k_TGD, v_TGD = k_TGD.to(kv_cache.dtype), v_TGD.to(kv_cache.dtype)
    if kv_cache.dtype == torch.float16:
        # Where one sequence overflows, no infinity may stay in a block that another sequence gets later: masked slots
        # are multiplied by zero, which does not silence it.
        k_TGD, v_TGD = k_TGD.nan_to_num(), v_TGD.nan_to_num()
    k_slots, v_slots = kv_cache.flatten(1, 2).unbind()
    k_slots.index_copy_(0, slot_mapping_T, k_TGD)
    v_slots.index_copy_(0, slot_mapping_T, v_TGD)
