"""Token embedding and output head. T tokens, S sampled rows, D hidden size, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """Rows of ``weight`` (V, D)."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, input_ids_T: Tensor) -> Tensor:
        return F.embedding(input_ids_T, self.weight)


class OutputHead(nn.Module):
    """Hidden states to float32 logits. Tied weights are the embedding's own parameter."""

    def __init__(self, vocab_size: int, hidden_size: int, *, tied_to: Embedding | None = None) -> None:
        super().__init__()
        if tied_to is None:
            self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)
        else:
            self.weight = tied_to.weight

    def forward(self, hidden_SD: Tensor) -> Tensor:
        return F.linear(hidden_SD, self.weight).float()
