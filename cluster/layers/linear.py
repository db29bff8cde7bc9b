"""Linear layers. Projections of one input are one matrix, so that a step takes fewer products.

Shapes: T tokens, I input size, O output size, M the merged outputs together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """``x W^T + b`` with uninitialised weights: a checkpoint fills them."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight, self.bias)


class MergedLinear(Linear):
    """Several projections of one input, stacked in the order of ``parts``; gives (T, M).

    In a checkpoint the parts are the siblings of this module: ``self_attn.q_proj`` for the part ``q_proj`` of
    ``self_attn.qkv_proj``.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> None:
        """
        Args:
            parts: Hugging Face module name to output size.
        """
        super().__init__(in_features, sum(parts.values()), bias=bias)
        self.parts = dict(parts)

    def part_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(``q_proj.weight``, the view of its rows) for every part and parameter."""
        for kind, parameter in self.named_parameters(recurse=False):
            for name, rows in zip(self.parts, parameter.split(list(self.parts.values())), strict=True):
                yield f"{name}.{kind}", rows
