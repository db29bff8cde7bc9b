"""FlashAttention 3 (Shah et al., 2024) in the place of ``paged_prefill``, where it is installed.

The same function, faster on Hopper; it chooses its splits by the batch, so it has no part in batch-invariant mode.

Shapes: T tokens, H query heads, D head size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor

from cluster.kernels.triton.paged_prefill import PrefillPlan

_DISTRIBUTION, _MAJOR = "flash_attn_3", "3"
_MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")  # where releases have it
_MAX_HEAD_DIM = 256


@functools.cache
def flash_attention() -> Callable[..., Tensor] | None:
    """Its attention over a paged cache; None: not installed, of another major version, or not for this device."""
    try:
        version = importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    if version.split(".")[0] != _MAJOR or torch.cuda.get_device_capability()[0] != 9:
        return None
    for name in _MODULES:
        try:
            return importlib.import_module(name).flash_attn_with_kvcache  # type: ignore[no-any-return]
        except ImportError:
            continue
    return None


def takes(q_THD: Tensor, kv_cache: Tensor, plan: PrefillPlan) -> bool:
    """Whether FlashAttention is there and computes such a step."""
    return (
        q_THD.is_cuda
        and flash_attention() is not None
        and q_THD.dtype == kv_cache.dtype
        and q_THD.dtype in (torch.float16, torch.bfloat16)
        and q_THD.shape[2] <= _MAX_HEAD_DIM
        and plan.first_token is not None
    )


def flash_prefill(
    q_THD: Tensor,
    kv_cache: Tensor,
    plan: PrefillPlan,
    out_THD: Tensor,
    *,
    scale: float,
    softcap: float,
    sliding_window: int | None,
    attend: Callable[..., Tensor],
) -> None:
    """As ``paged_prefill``, for plans whose sequences lie side by side.

    Args:
        attend: what ``flash_attention`` gave.
    """
    tokens = slice(plan.first_token, plan.first_token + plan.num_tokens)
    out_THD[tokens] = attend(
        q_THD[tokens],
        kv_cache[0],
        kv_cache[1],
        cache_seqlens=plan.context_lens_S,
        page_table=plan.block_tables_SB,
        cu_seqlens_q=plan.query_starts_S1,
        max_seqlen_q=plan.max_query_len,
        softmax_scale=scale,
        causal=True,
        # Positions to the left of a query and to its right; its own comes on top.
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap,
    )
