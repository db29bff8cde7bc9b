"""Angles of a step's positions, in C."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from cluster.kernels.cpu.library import Op, library

_P, _I = ctypes.c_void_p, ctypes.c_int64


def rotary_angles(
    positions_T: Tensor, frequencies_R: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As ``reference.rotary_angles``.

    Args:
        positions_T: contiguous int64.
        frequencies_R: contiguous float32.
        dtype: float32.

    Raises:
        ValueError: tensors of another type, or not contiguous.
    """
    if (
        positions_T.dtype is not torch.int64
        or frequencies_R.dtype is not torch.float32
        or dtype is not torch.float32
        or not (positions_T.is_contiguous() and frequencies_R.is_contiguous())
    ):
        raise ValueError(
            f"positions must be contiguous int64, frequencies and angles float32; got {positions_T.dtype}, "
            f"{frequencies_R.dtype} and {dtype}"
        )
    num_rows, num_frequencies = positions_T.shape[0], frequencies_R.shape[0]
    cos_TR, sin_TR = torch.empty(num_rows, num_frequencies), torch.empty(num_rows, num_frequencies)
    _function()(
        positions_T.data_ptr(),
        frequencies_R.data_ptr(),
        num_rows,
        num_frequencies,
        scale,
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
    )
    return cos_TR, sin_TR


@cache
def _function() -> Op:
    found = library()
    if found is None:
        raise RuntimeError("the CPU kernels are not compiled")
    return found.function("rotary_angles", _P, _P, _I, _I, ctypes.c_float, _P, _P)
