"""Root-mean-square normalisation. T tokens, N heads, D hidden or head size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cluster import kernels


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return kernels.rms_norm(x_TD, self.weight, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(normalised sum, sum) of a sub-layer's output and the residual stream."""
        return kernels.add_rms_norm(x_TD, residual_TD, self.weight, self.eps)

    def heads_(self, x_TND: Tensor) -> None:
        """Normalises every head of ``x_TND``, in place."""
        kernels.rms_norm(x_TND, self.weight, self.eps, out=x_TND)
