"""One public function per op, bound to a backend by ``use``; to torch's until then.

Formulas, shapes and dtypes are documented in ``reference.py``, which every backend is tested against. Callers write
``kernels.linear(...)``, never ``from cluster.kernels import linear``: a name taken once would keep its first backend.

Weights and plans belong to the backend that made them: ``linear`` and ``embedding`` take a tensor (O, I) or a matrix
that the backend has packed, ``paged_attention`` takes what ``plan_attention`` gave.
"""

from __future__ import annotations

import functools

from cluster.kernels import torch_attention, torch_ops
from cluster.kernels.backend import Backend, BackendKind
from cluster.kernels.torch_attention import paged_attention, plan_attention
from cluster.kernels.torch_ops import (
    add_rms_norm,
    embedding,
    linear,
    reshape_and_cache,
    rms_norm,
    rotary_and_cache,
    rotary_angles,
    silu_mul,
)

OPS = (
    "add_rms_norm",
    "embedding",
    "linear",
    "paged_attention",
    "plan_attention",
    "reshape_and_cache",
    "rms_norm",
    "rotary_and_cache",
    "rotary_angles",
    "silu_mul",
)

__all__ = [
    "OPS",
    "Backend",
    "BackendKind",
    "add_rms_norm",
    "backend",
    "current",
    "embedding",
    "linear",
    "paged_attention",
    "plan_attention",
    "reshape_and_cache",
    "rms_norm",
    "rotary_and_cache",
    "rotary_angles",
    "silu_mul",
    "use",
]

_TORCH = Backend(
    kind="torch",
    name="torch",
    batch_invariant=False,
    functions={name: getattr(torch_ops, name, None) or getattr(torch_attention, name) for name in OPS},
)
_current = _TORCH


@functools.cache
def backend(kind: BackendKind, *, batch_invariant: bool = False) -> Backend | None:
    """The backend of this kind; None: it does not run here (no compiled library, no triton). Imports it when asked.

    Args:
        batch_invariant: of "triton", which has both modes; the others are what they are.
    """
    if kind == "torch":
        return _TORCH
    if kind == "cpu":
        from cluster.kernels.cpu.backend import create

        return create()
    try:
        from cluster.kernels.triton.backend import functions
    except ModuleNotFoundError:  # torch comes without triton where there is no CUDA
        return None
    # What is not worth a kernel of its own stays torch's.
    own = functions(batch_invariant=batch_invariant)
    return Backend(kind="triton", name="triton", batch_invariant=batch_invariant, functions={**_TORCH.functions, **own})


def current() -> Backend:
    """The backend in use."""
    return _current


def use(wanted: Backend) -> None:
    """Binds the public functions for the whole process; next to nothing where they are bound already."""
    global _current
    if wanted is not _current:
        globals().update(wanted.functions)
        _current = wanted
