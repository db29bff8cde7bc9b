"""The ops between the products of a layer, in C; formulas in ``src/`` and in ``reference.py``.

float32 on the CPU; every row's result depends on that row alone.

Shapes: T tokens, D hidden or head size, N heads of any kind, F intermediate size, H query heads, G key-value heads, R =
D / 2.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cluster.kernels.cpu import memory
from cluster.kernels.cpu.attention import check_cache
from cluster.kernels.cpu.library import Library, Op, library

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """As ``reference.rms_norm``.

    Args:
        x: (T, D) or (T, N, D); the last dimension is contiguous, so that heads of a fused projection can be given.
        out: of x's shape and under the same rule; x itself is allowed. None: a new tensor.

    Raises:
        ValueError: tensors of another shape or type.
    """
    if out is None:
        out = memory.empty(*x.shape)
    if x.dim() == 2:
        (num_outer, size), num_inner = x.shape, 1
        (x_stride, unit), x_inner_stride = x.stride(), 0
        (out_stride, out_unit), out_inner_stride = out.stride(), 0
    else:
        num_outer, num_inner, size = x.shape
        x_stride, x_inner_stride, unit = x.stride()
        out_stride, out_inner_stride, out_unit = out.stride()
    _check_float32(x, out)
    if unit != 1 or out_unit != 1 or out.shape != x.shape:
        raise ValueError(
            f"rows must be contiguous and the output of their shape; got {tuple(x.shape)} of strides {x.stride()} and "
            f"{tuple(out.shape)} of strides {out.stride()}"
        )
    _functions().rms_norm(
        x.data_ptr(),
        x_stride,
        x_inner_stride,
        _norm_weight(weight_D, size),
        eps,
        num_outer,
        num_inner,
        size,
        out.data_ptr(),
        out_stride,
        out_inner_stride,
    )
    return out


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``reference.add_rms_norm``: (norm of the sum, the sum), both contiguous.

    Raises:
        ValueError: tensors of another shape or type, or not contiguous.
    """
    num_rows, size = x_TD.shape
    _check_float32(x_TD, residual_TD)
    if residual_TD.shape != x_TD.shape or not (x_TD.is_contiguous() and residual_TD.is_contiguous()):
        raise ValueError(
            f"both terms must be contiguous and of one shape; got {tuple(x_TD.shape)} of strides {x_TD.stride()} and "
            f"{tuple(residual_TD.shape)} of strides {residual_TD.stride()}"
        )
    out_TD, total_TD = memory.empty(num_rows, size), memory.empty(num_rows, size)
    _functions().add_rms_norm(
        x_TD.data_ptr(),
        residual_TD.data_ptr(),
        _norm_weight(weight_D, size),
        eps,
        num_rows,
        size,
        out_TD.data_ptr(),
        total_TD.data_ptr(),
    )
    return out_TD, total_TD


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """As ``reference.silu_mul``: (T, 2F), gates first, to (T, F).

    Raises:
        ValueError: a tensor of another shape or type, or not contiguous.
    """
    num_rows, width = gate_up_TF.shape
    _check_float32(gate_up_TF)
    if width % 2 or not gate_up_TF.is_contiguous():
        raise ValueError(f"gates and ups must lie side by side, contiguous; got {tuple(gate_up_TF.shape)}")
    out_TF = memory.empty(num_rows, width // 2)
    _functions().silu_mul(gate_up_TF.data_ptr(), num_rows, width // 2, out_TF.data_ptr())
    return out_TF


def rotary_and_cache(
    qkv_TND: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    kv_cache: Tensor,
    slot_mapping_T: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """As ``reference.rotary_and_cache``; gives the queries (T, H, D), a view of ``qkv_TND``, which is changed.

    Args:
        qkv_TND: contiguous float32: query heads, then key heads, then value heads.
        cos_TR, sin_TR: contiguous float32.
        kv_cache: (2, num_blocks, block_size, G, D) of float32, bfloat16 or float16, contiguous; what it holds
            afterwards is for ``paged_attention`` alone to read. Values are made finite.
        slot_mapping_T: int64, contiguous; a negative slot stores nothing.

    Raises:
        ValueError: tensors of another shape or type, or not contiguous.
    """
    num_tokens, total_heads, head_dim = qkv_TND.shape
    num_blocks, cache_heads, kv_type = check_cache(kv_cache, kv_cache.shape[2], head_dim)
    _check_float32(qkv_TND, cos_TR, sin_TR)
    if (
        total_heads != num_heads + 2 * num_kv_heads
        or cache_heads != num_kv_heads
        or head_dim % 2
        or cos_TR.shape != (num_tokens, head_dim // 2)
        or sin_TR.shape != cos_TR.shape
        or not (qkv_TND.is_contiguous() and cos_TR.is_contiguous() and sin_TR.is_contiguous())
    ):
        raise ValueError(
            f"{num_heads} query heads and {num_kv_heads} key-value heads, contiguous, need as many angles as half a "
            f"head; got heads {tuple(qkv_TND.shape)}, angles {tuple(cos_TR.shape)} and {tuple(sin_TR.shape)}, "
            f"a cache {tuple(kv_cache.shape)}"
        )
    _functions().rotary_and_cache(
        qkv_TND.data_ptr(),
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        _slots(slot_mapping_T, num_tokens),
        num_tokens,
        num_heads,
        kv_cache.data_ptr(),
        num_blocks,
        kv_cache.shape[2],
        num_kv_heads,
        head_dim,
        kv_type,
    )
    return qkv_TND[:, :num_heads]


def reshape_and_cache(k_TGD: Tensor, v_TGD: Tensor, kv_cache: Tensor, slot_mapping_T: Tensor) -> None:
    """As ``reference.reshape_and_cache``, in the layout that ``paged_attention`` reads.

    Args:
        k_TGD, v_TGD: float32 of equal strides; a token's heads are contiguous.
        kv_cache, slot_mapping_T: as in ``rotary_and_cache``.

    Raises:
        ValueError: tensors of another shape or type.
    """
    num_tokens, num_kv_heads, head_dim = k_TGD.shape
    num_blocks, cache_heads, kv_type = check_cache(kv_cache, kv_cache.shape[2], head_dim)
    _check_float32(k_TGD, v_TGD)
    token_stride, head_stride, unit = k_TGD.stride()
    if (
        v_TGD.shape != k_TGD.shape
        or v_TGD.stride() != k_TGD.stride()
        or cache_heads != num_kv_heads
        or unit != 1
        or head_stride != head_dim
    ):
        raise ValueError(
            f"keys and values must lie alike, contiguous within a token, with {cache_heads} heads; got "
            f"{tuple(k_TGD.shape)} of strides {k_TGD.stride()} and {tuple(v_TGD.shape)} of strides {v_TGD.stride()}"
        )
    _functions().reshape_and_cache(
        k_TGD.data_ptr(),
        v_TGD.data_ptr(),
        token_stride,
        _slots(slot_mapping_T, num_tokens),
        num_tokens,
        kv_cache.data_ptr(),
        num_blocks,
        kv_cache.shape[2],
        num_kv_heads,
        head_dim,
        kv_type,
    )


def _check_float32(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype is not torch.float32:
            raise ValueError(f"the CPU kernels compute in float32; got {tensor.dtype} {tuple(tensor.shape)}")


def _norm_weight(weight_D: Tensor, size: int) -> int:
    if weight_D.dtype is not torch.float32 or weight_D.shape != (size,) or not weight_D.is_contiguous():
        raise ValueError(
            f"a norm's weight must be contiguous float32 of {size}; got {weight_D.dtype} {tuple(weight_D.shape)}"
        )
    return weight_D.data_ptr()


def _slots(slot_mapping_T: Tensor, num_tokens: int) -> int:
    if (
        slot_mapping_T.dtype is not torch.int64
        or slot_mapping_T.shape != (num_tokens,)
        or not slot_mapping_T.is_contiguous()
    ):
        raise ValueError(
            f"slots must be contiguous int64, one for each of {num_tokens} tokens; got {slot_mapping_T.dtype} "
            f"{tuple(slot_mapping_T.shape)}"
        )
    return slot_mapping_T.data_ptr()


@dataclass(frozen=True, slots=True)
class _Functions:
    rms_norm: Op
    add_rms_norm: Op
    silu_mul: Op
    rotary_and_cache: Op
    reshape_and_cache: Op


@cache
def _functions() -> _Functions:
    return _bind(library())


def _bind(found: Library | None) -> _Functions:
    if found is None:
        raise RuntimeError("the CPU kernels are not compiled")
    cache_argtypes = (_P, _I, _I, _I, _I, _I)
    return _Functions(
        rms_norm=found.function("rms_norm", _P, _I, _I, _P, _F, _I, _I, _I, _P, _I, _I),
        add_rms_norm=found.function("add_rms_norm", _P, _P, _P, _F, _I, _I, _P, _P),
        silu_mul=found.function("silu_mul", _P, _I, _I, _P),
        rotary_and_cache=found.function("rotary_and_cache", _P, _P, _P, _P, _I, _I, *cache_argtypes),
        reshape_and_cache=found.function("reshape_and_cache", _P, _P, _I, _P, _I, *cache_argtypes),
    )
