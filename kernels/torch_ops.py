"""The torch backend's element-wise ops: the formulas of ``reference.py`` in as few torch calls as they take.

At small batches a step's time is the number of calls, not their arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total_TD = x_TD + residual_TD
    return F.rms_norm(total_TD, weight_D.shape, weight_D, eps), total_TD


def rotary(x_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    x1, x2 = x_TND.chunk(2, dim=-1)
    return torch.addcmul(x_TND * cos_T1D, torch.cat((x2, x1), dim=-1), sin_T1D)


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


def reshape_and_cache(k_TGD: Tensor, v_TGD: Tensor, kv_cache: Tensor, slot_mapping_T: Tensor) -> None:
    if k_TGD.dtype == torch.float16:
        # Where one sequence overflows, no infinity may stay in a block that another sequence gets later: masked slots
        # are multiplied by zero, which does not silence it.
        k_TGD, v_TGD = k_TGD.nan_to_num(), v_TGD.nan_to_num()
    k_slots, v_slots = kv_cache.flatten(1, 2).unbind()
    k_slots.index_copy_(0, slot_mapping_T, k_TGD)
    v_slots.index_copy_(0, slot_mapping_T, v_TGD)
