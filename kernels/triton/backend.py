"""The functions that ``cluster.kernels`` offers, as this backend has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from cluster.kernels.triton.attention import paged_attention, plan_attention
from cluster.kernels.triton.linear import embedding, linear
from cluster.kernels.triton.reshape_and_cache import reshape_and_cache
from cluster.kernels.triton.rms_norm import add_rms_norm, rms_norm
from cluster.kernels.triton.rotary_and_cache import rotary_and_cache
from cluster.kernels.triton.silu_mul import silu_mul


def functions(*, batch_invariant: bool) -> dict[str, Callable[..., Any]]:
    """By the name of the op.

    Args:
        batch_invariant: a row's result does not depend on the rows beside it, for the price of tiles that do not
            follow the batch and of no cuBLAS.
    """
    return {
        "add_rms_norm": add_rms_norm,
        "embedding": embedding,
        "linear": partial(linear, batch_invariant=batch_invariant),
        "paged_attention": paged_attention,
        "plan_attention": partial(plan_attention, batch_invariant=batch_invariant),
        "reshape_and_cache": reshape_and_cache,
        "rms_norm": rms_norm,
        "rotary_and_cache": rotary_and_cache,
        "silu_mul": silu_mul,
    }
