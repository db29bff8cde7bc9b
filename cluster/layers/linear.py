"""Linear layers. Projections of one input are one matrix, so that a step takes fewer products.

Shapes: T tokens, I input size, O output size, M the merged outputs together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cluster import kernels
from cluster.layers.span import Span


class Linear(nn.Module):
    """``x W^T + b`` with empty weights: a loader puts in the checkpoint's, as the backend in use takes them."""

    weight: Any
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        return kernels.linear(x_TI, self.weight, self.bias)


class MergedLinear(Linear):
    """Several projections of one input, stacked in the order of ``parts``; gives (T, M).

    In a checkpoint the parts are the siblings of this module: ``self_attn.q_proj`` for the part ``q_proj`` of
    ``self_attn.qkv_proj``.

    Attributes:
        parts: Hugging Face module name to the rows of its matrix that lie here.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int | Span], *, bias: bool = False) -> None:
        """
        Args:
            parts: a number means a whole matrix of so many rows.
        """
        spans = {name: Span.whole(rows) if isinstance(rows, int) else rows for name, rows in parts.items()}
        super().__init__(in_features, sum(rows.size for rows in spans.values()), bias=bias)
        self.parts = spans
