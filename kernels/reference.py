"""The truth for every op: its formula in plain torch, float32 inside, no care for speed. Other backends are tested
against these.

Shapes: T tokens of a step, S its sequences, B blocks of the longest table, D hidden or head size, F intermediate size,
H query heads, G key-value heads (H is a multiple of G), N heads of either kind, L context length, R rows that sample, V
vocabulary.
"""

from __future__ import annotations

import math
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


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x W^T + b``, in x's dtype (I inputs, O outputs). Packed weights stand for the numbers they unpack to."""
    y_TO = x_TI.float() @ weight_OI.float().T
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)


def embedding(input_ids_T: Tensor, weight_VD: Tensor, *, first_id: int | None = None) -> Tensor:
    """Rows of the weight, one per token.

    Args:
        first_id: of the weight, which holds part of a vocabulary: all other ids give zeros. None: it holds all ids.
    """
    if first_id is None:
        return weight_VD[input_ids_T]
    is_held_T = (input_ids_T >= first_id) & (input_ids_T < first_id + len(weight_VD))
    rows_TD = weight_VD[(input_ids_T - first_id).clamp(0, len(weight_VD) - 1)]
    return torch.where(is_held_T[:, None], rows_TD, 0)


def rotary_angles(
    positions_T: Tensor, frequencies_R: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of ``position * frequency``, each times ``scale``; (T, R) in ``dtype``, computed in float32."""
    angles_TR = positions_T.float()[:, None] * frequencies_R
    return (angles_TR.cos() * scale).to(dtype), (angles_TR.sin() * scale).to(dtype)


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


def matmul_int8(x_TI: Tensor, q_OI: Tensor, scales_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """``y_to = scale_o * sum_i x_ti q_oi + b_o`` (I inputs, O outputs), in x's dtype."""
    y_TO = x_TI.float() @ q_OI.float().T * scales_O.float()
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)


def matmul_int4(
    x_TI: Tensor, q_OI: Tensor, scales_OK: Tensor, zeros_OK: Tensor, bias_O: Tensor | None, *, group_size: int
) -> Tensor:
    """``y_to = sum_i x_ti scale_ok (q_oi - zero_ok) + b_o`` with k the group of ``group_size`` inputs that i is in."""
    scales_OI = scales_OK.float().repeat_interleave(group_size, dim=1)[:, : x_TI.shape[1]]
    zeros_OI = zeros_OK.float().repeat_interleave(group_size, dim=1)[:, : x_TI.shape[1]]
    y_TO = x_TI.float() @ (scales_OI * (q_OI.float() - zeros_OI)).T
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)


def gumbel(key: int, vocab_size: int) -> Tensor:
    """float64 (V,): ``-log(-log(1 - u_t))``, ``u_t`` the upper 63 bits of output t of SplitMix64 (Steele, Lea and
    Flood, OOPSLA 2014) started at ``key``, the last of them set, over 2**63."""
    mask, noise = 2**64 - 1, []
    for token in range(vocab_size):
        state = key + (token + 1) * 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        u = min(((state ^ state >> 31) >> 1 | 1) / 2**63, 1 - 2**-53)
        noise.append(-math.log(-math.log1p(-u)))
    return torch.tensor(noise, dtype=torch.float64)


def sample(
    scores_RV: Tensor,
    keys: Sequence[int],
    temperatures: Sequence[float],
    top_ks: Sequence[int],
    top_ps: Sequence[float],
    min_ps: Sequence[float],
) -> Tensor:
    """One token of V per row: the likeliest for temperatures below 1e-5, else drawn by Gumbel-max from what the filters
    keep of ``softmax(scores / temperature)``: top_k (0: off), top_p over what that left, min_p. Ties at a filter's edge
    stay together; a tie of the maximum goes to the lowest id. Gives int64 (R,)."""
    tokens = []
    for index, scores_V in enumerate(scores_RV):
        if temperatures[index] < 1e-5:
            tokens.append(scores_V.argmax())
            continue
        x_V = (scores_V - scores_V.max()) / temperatures[index]
        kept_V = torch.ones_like(x_V, dtype=torch.bool)
        if 0 < top_ks[index] < len(x_V):
            kept_V &= x_V >= x_V.topk(top_ks[index]).values[-1]
        if top_ps[index] < 1:
            ranked_V, order_V = x_V.sort(descending=True)
            weights_V = ranked_V.double().exp() * kept_V[order_V]
            before_V = weights_V.cumsum(0) - weights_V
            kept_V &= x_V >= ranked_V[before_V < top_ps[index] * weights_V.sum()].min()
        if min_ps[index] > 0:
            kept_V &= x_V >= math.log(min_ps[index])
        drawn_V = x_V.double() + gumbel(keys[index], len(x_V)).to(x_V.device)
        tokens.append(drawn_V.masked_fill(~kept_V, -math.inf).argmax())
    return torch.stack(tokens)


def apply_penalties(
    scores_V: Tensor,
    prompt_token_ids: Sequence[int],
    output_token_ids: Sequence[int],
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    biases: dict[int, float] | None = None,
    suppressed: Sequence[int] = (),
) -> Tensor:
    """One row of scores, penalised for what was said: divided by ``repetition`` (multiplied, if negative) for every
    token seen, less ``presence`` and ``frequency`` times its count for every token of the output; plus ``biases``;
    -1e30 for ``suppressed`` tokens."""
    adjusted_V = scores_V.clone()
    for token in {*prompt_token_ids, *output_token_ids}:
        adjusted_V[token] = adjusted_V[token] / repetition if adjusted_V[token] > 0 else adjusted_V[token] * repetition
    for token in set(output_token_ids):
        adjusted_V[token] -= presence + frequency * list(output_token_ids).count(token)
    for token, bias in (biases or {}).items():
        adjusted_V[token] += bias
    adjusted_V.clamp_(-1e30, 1e30)
    adjusted_V[list(suppressed)] = -1e30
    return adjusted_V
