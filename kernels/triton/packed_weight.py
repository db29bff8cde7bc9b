"""Quantized weights as the GPU kernels read them.

    int8: w_oi = scale_o q_oi,               q in [-127, 127],  scale_o = max_i |w_oi| / 127
    int4: w_oi = scale_ok (q_oi - zero_ok),  q in [0, 15],      over groups k of consecutive inputs

Shapes: O outputs, I inputs, K groups of an output, C bytes of packed int4 per output (group size / 2 for each group).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_GROUP_SIZE = 128
_MIN_GROUP_SIZE = 32  # two halves of 16, the least that a tensor core sums over


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight matrix (O, I).

    Attributes:
        values: int8: (O, I) int8; int4: (O, C) uint8, whose byte c of a group holds the group's inputs c (low half) and
            c + group_size / 2 (high half).
        scales: float32, (O,) for int8, (O, K) for int4.
        zeros: (O, K) uint8 for int4; None for int8.
        group_size: inputs of a group; 0 for int8. The last group of a row may be partly beyond its inputs.
        dtype: of the matrix it was made from, and of the rows that an embedding takes from it.
    """

    format: Literal["int8", "int4"]
    out_features: int
    in_features: int
    group_size: int
    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    dtype: torch.dtype

    def to(self, device: torch.device) -> PackedWeight:
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, values=self.values.to(device), scales=self.scales.to(device), zeros=zeros)

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows ``ids_T`` as the kernels compute with them; gives float32 (T, I)."""
        values, scales = self.values[ids_T], self.scales[ids_T]
        if self.zeros is None:
            return values.float() * scales[:, None]
        bytes_TKC = values.view(len(ids_T), scales.shape[1], -1)
        q_TKG = torch.cat((bytes_TKC & 15, bytes_TKC >> 4), dim=-1).float()
        weights_TKG = (q_TKG - self.zeros[ids_T].float()[..., None]) * scales[..., None]
        return weights_TKG.flatten(1)[:, : self.in_features]


def pack(weight_OI: Tensor, format: Literal["int8", "int4"], *, group_size: int | None = None) -> PackedWeight:
    """Rounds to the nearest representable weights; on the weight's device.

    Args:
        group_size: of int4; a power of two from 32 to 128; unset: the largest.

    Raises:
        ValueError: the group size is none of these.
    """
    if format == "int8":
        scales_O = _at_least_tiny(weight_OI.float().abs().amax(dim=1) / 127)
        values_OI = (weight_OI.float() / scales_O[:, None]).round_().to(torch.int8)
        return _packed("int8", weight_OI, 0, values_OI, scales_O, None)
    group_size = group_size or MAX_GROUP_SIZE
    if group_size not in (_MIN_GROUP_SIZE, 64, MAX_GROUP_SIZE):
        raise ValueError(f"int4 groups have 32, 64 or 128 inputs, not {group_size}")
    out_features, in_features = weight_OI.shape
    padded_OI = F.pad(weight_OI.float(), (0, -in_features % group_size))
    groups_OKG = padded_OI.view(out_features, -1, group_size)
    # A range that holds 0 keeps the zero point inside the four bits.
    low_OK, high_OK = groups_OKG.amin(dim=-1).clamp_(max=0), groups_OKG.amax(dim=-1).clamp_(min=0)
    scales_OK = _at_least_tiny((high_OK - low_OK) / 15)
    zeros_OK = (-low_OK / scales_OK).round_()
    q_OKG = (groups_OKG / scales_OK[..., None] + zeros_OK[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    low_OKC, high_OKC = q_OKG.chunk(2, dim=-1)
    values_OC = (low_OKC | high_OKC << 4).flatten(1)
    return _packed("int4", weight_OI, group_size, values_OC, scales_OK, zeros_OK.to(torch.uint8))


def num_bytes(format: Literal["int8", "int4"], out_features: int, in_features: int) -> int:
    """Of a packed matrix with groups of the largest size."""
    if format == "int8":
        return out_features * (in_features + 4)
    num_groups = -(-in_features // MAX_GROUP_SIZE)
    return out_features * num_groups * (MAX_GROUP_SIZE // 2 + 4 + 1)


def unpack(weight: PackedWeight) -> Tensor:
    """float32 (O, I): what the kernels compute with."""
    return weight.rows(torch.arange(weight.out_features, device=weight.values.device))


def _at_least_tiny(scales: Tensor) -> Tensor:
    """Rows of zeros have a scale too: theirs divides by no zero."""
    return scales.clamp_(min=torch.finfo(torch.float32).tiny)


def _packed(
    format: Literal["int8", "int4"],
    weight_OI: Tensor,
    group_size: int,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
) -> PackedWeight:
    return PackedWeight(
        format=format,
        out_features=weight_OI.shape[0],
        in_features=weight_OI.shape[1],
        group_size=group_size,
        values=values,
        scales=scales,
        zeros=zeros,
        dtype=weight_OI.dtype,
    )
