"""The C kernels as a backend."""

from __future__ import annotations

from cluster.kernels.backend import Backend
from cluster.kernels.cpu.attention import paged_attention, plan_attention
from cluster.kernels.cpu.elementwise import add_rms_norm, reshape_and_cache, rms_norm, rotary_and_cache, silu_mul
from cluster.kernels.cpu.library import library
from cluster.kernels.cpu.linear import embedding, linear
from cluster.kernels.cpu.rotary import rotary_angles


def create() -> Backend | None:
    """None: the library is not compiled."""
    found = library()
    if found is None:
        return None
    functions = {
        "add_rms_norm": add_rms_norm,
        "embedding": embedding,
        "linear": linear,
        "paged_attention": paged_attention,
        "plan_attention": plan_attention,
        "reshape_and_cache": reshape_and_cache,
        "rms_norm": rms_norm,
        "rotary_and_cache": rotary_and_cache,
        "rotary_angles": rotary_angles,
        "silu_mul": silu_mul,
    }
    return Backend(kind="cpu", name=f"cpu {found.isa}", batch_invariant=True, functions=functions)
