"""Token embedding and output head. T tokens, S sampled rows, D hidden size, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cluster import kernels


class Embedding(nn.Module):
    """Rows of ``weight`` (V, D)."""

    weight: Any

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, input_ids_T: Tensor) -> Tensor:
        return kernels.embedding(input_ids_T, self.weight)


class OutputHead(nn.Module):
    """Hidden states to float32 logits. Tied weights are the embedding's own."""

    weight: Any

    def __init__(self, vocab_size: int, hidden_size: int, *, tied_to: Embedding | None = None) -> None:
        super().__init__()
        if tied_to is None:
            self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)
        else:
            self.weight = tied_to.weight

    def forward(self, hidden_SD: Tensor) -> Tensor:
        return kernels.linear(hidden_SD, self.weight, None).float()
