"""Linear layers over packed weights: float32, bfloat16, int8 or int4 weights, float32 activations.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from cluster.kernels.cpu import memory
from cluster.kernels.cpu.library import Library, Op, library

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)

LAYOUT_VERSION = 3
"""Changes with what the bytes of ``PackedWeight.data`` mean; a copy on disk of another version is of no use."""

_TILE = 16
_GROUP_SIZES = (128, 112, 96, 80, 64, 48, 32)
_OUTLIER_BYTES = 516  # per row, of src/quantized_rows.h
_P, _I = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix (O, I) as the kernels read it; ``src/linear_*.c`` say how.

    Attributes:
        format: of a weight.
        out_features, in_features: O and I.
        group_size: inputs that share a scale: of the activations (int8), of both (int4); 1 for floats.
        data: uint8, everything in one piece, so that a copy on disk can be mapped; of ``num_bytes`` bytes.
    """

    format: WeightFormat
    out_features: int
    in_features: int
    group_size: int
    data: Tensor

    @classmethod
    def empty(
        cls, format: WeightFormat, out_features: int, in_features: int, *, group_size: int | None = None
    ) -> PackedWeight:
        """Zeros; ``pack_rows`` fills it. ``group_size`` None: ``default_group_size``."""
        group_size = group_size or default_group_size(format, in_features)
        size = num_bytes(format, out_features, in_features, group_size=group_size)
        return cls(format, out_features, in_features, group_size, memory.zeros(size))

    def pack_rows(self, first_row: int, rows_OI: Tensor) -> None:
        """Fills outputs from ``first_row`` on.

        Args:
            first_row: a multiple of 16; so is the end, unless it is the matrix's: a tile is packed whole.
            rows_OI: any float type.

        Raises:
            ValueError: the rows do not fit or are not aligned.
        """
        num_rows, end = rows_OI.shape[0], first_row + rows_OI.shape[0]
        if rows_OI.dim() != 2 or rows_OI.shape[1] != self.in_features or not 0 <= first_row <= end <= self.out_features:
            raise ValueError(
                f"rows {first_row} to {end} of {rows_OI.shape[-1]} inputs do not fit a matrix of {self.out_features} "
                f"by {self.in_features}"
            )
        if first_row % _TILE or (end % _TILE and end != self.out_features):
            raise ValueError(f"rows {first_row} to {end} cut a tile of {_TILE} outputs")
        rows_OI = rows_OI.detach().to(torch.float32).contiguous()
        _functions(self.format).pack(
            rows_OI.data_ptr(),
            num_rows,
            self.in_features,
            self.out_features,
            self.group_size,
            first_row,
            self.data.data_ptr(),
        )


def default_group_size(format: WeightFormat, in_features: int) -> int:
    """The first of the group sizes that divides ``in_features``, else the largest: inputs are padded then."""
    if format in ("float32", "bfloat16"):
        return 1
    return next((size for size in _GROUP_SIZES if in_features % size == 0), _GROUP_SIZES[0])


def num_bytes(format: WeightFormat, out_features: int, in_features: int, *, group_size: int | None = None) -> int:
    """Of a packed matrix, scales and padding included."""
    group_size = group_size or default_group_size(format, in_features)
    outputs = -(-out_features // _TILE) * _TILE
    num_groups = -(-in_features // group_size)
    match format:
        case "float32":
            return outputs * in_features * 4
        case "bfloat16":
            return outputs * -(-in_features // 2) * 4
        case "int8":
            return outputs * (num_groups * group_size + 4)
        case "int4":
            return outputs * num_groups * (group_size // 2 + 4)


def pack(weight_OI: Tensor, format: WeightFormat, *, group_size: int | None = None) -> PackedWeight:
    """``weight_OI`` (any float type) in ``format``."""
    packed = PackedWeight.empty(format, *weight_OI.shape, group_size=group_size)
    packed.pack_rows(0, weight_OI)
    return packed


def linear(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """``x W^T + b``, float32 (T, O). A row's result depends on that row alone.

    Args:
        x_TI, bias_O: contiguous float32.

    Raises:
        ValueError: ``x_TI`` is of another size or type.
    """
    num_rows, num_inputs = x_TI.shape
    if num_inputs != weight.in_features or x_TI.dtype != torch.float32 or not x_TI.is_contiguous():
        raise ValueError(
            f"rows must be contiguous float32 with {weight.in_features} inputs; got {x_TI.dtype} {tuple(x_TI.shape)}"
        )
    out_TO = memory.empty(num_rows, weight.out_features)
    group_size = weight.group_size
    row_bytes = -(-num_inputs // group_size) * (group_size + 8) + _OUTLIER_BYTES if group_size > 1 else 0
    scratch = memory.empty(num_rows * row_bytes, dtype=torch.uint8)
    _functions(weight.format).linear(
        x_TI.data_ptr(),
        num_rows,
        num_inputs,
        weight.out_features,
        group_size,
        weight.data.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        out_TO.data_ptr(),
        scratch.data_ptr(),
    )
    return out_TO


def embedding(ids_T: Tensor, weight: PackedWeight, *, first_id: int | None = None) -> Tensor:
    """Rows of the matrix as the linear kernel takes them, float32 (T, I); zeros for ids that it does not hold.

    Args:
        ids_T: int64.
        first_id: that of row 0; None: 0.
    """
    ids_T = ids_T.contiguous()
    out_TI = torch.empty(ids_T.numel(), weight.in_features)
    _functions(weight.format).unpack(
        ids_T.data_ptr(),
        first_id or 0,
        ids_T.numel(),
        weight.in_features,
        weight.out_features,
        weight.group_size,
        weight.data.data_ptr(),
        out_TI.data_ptr(),
    )
    return out_TI


def unpack(weight: PackedWeight) -> Tensor:
    """The whole matrix, float32 (O, I)."""
    return embedding(torch.arange(weight.out_features), weight)


@dataclass(frozen=True, slots=True)
class _Functions:
    linear: Op
    pack: Op
    unpack: Op


@cache
def _functions(format: WeightFormat) -> _Functions:
    return _bind(library(), format)


def _bind(found: Library | None, format: WeightFormat) -> _Functions:
    if found is None:
        raise RuntimeError("the CPU kernels are not compiled")
    return _Functions(
        linear=found.function(f"linear_{format}", _P, _I, _I, _I, _I, _P, _P, _P, _P),
        pack=found.function(f"pack_{format}", _P, _I, _I, _I, _I, _I, _P),
        unpack=found.function(f"unpack_{format}", _P, _I, _I, _I, _I, _I, _P, _P),
    )
