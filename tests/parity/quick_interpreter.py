"""Triton's interpreter without what it does again at every call and operation to the same outcome, or throws away: two
to three times as quick. What the kernels compute is held against the reference by the tests that use it."""

from __future__ import annotations

from functools import cache
from math import prod
from types import SimpleNamespace

import numpy as np
from triton import language as tl
from triton._utils import validate_block_shape
from triton.runtime import interpreter

_NP_DTYPES = {
    dtype.name: interpreter._get_np_dtype(dtype)
    for dtype in vars(tl).values()
    if type(dtype) is tl.dtype and dtype != tl.void
}


def install() -> None:
    """For the whole process."""
    # The language is replaced by the interpreted one around every call of a kernel, and of each function in it.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    # Sums and products of integers are computed again in 64 bits, for an assertion that only debug mode looks at.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    # Tables and shapes are built again for every value.
    interpreter._get_np_dtype = _get_np_dtype
    tl.block_type.__init__ = _init_block_type
    tl.tensor.__init__ = _init_tensor


def _get_np_dtype(dtype: tl.dtype) -> np.dtype:
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _NP_DTYPES[scalar.name]


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: list) -> None:
    self.element_ty = element_ty
    self.shape, self.numel, text = _block(*(size.value if isinstance(size, tl.constexpr) else size for size in shape))
    self.name = f"<{text}, {element_ty}>"


@cache
def _block(*shape: int) -> tuple[tl.tuple, int, str]:
    if not shape:
        raise TypeError("0d block_type is forbidden")
    values = tl.tuple(shape)
    return values, validate_block_shape(shape), str(values)


def _init_tensor(self: tl.tensor, handle: interpreter.TensorHandle, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _constants(*type.shape) if type.is_block() else _constants()


@cache
def _constants(*shape: int) -> tuple[tl.tuple, tl.constexpr]:
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(prod(shape))
