"""Embedding and output head whose vocabulary is spread over ranks. T tokens, D hidden size, V ids of a rank.

V is the same on every rank; the last ranks' rows beyond the vocabulary are zeros.
"""

from __future__ import annotations

from torch import Tensor

from cluster import kernels
from cluster.distributed.communicator import Communicator
from cluster.layers.embedding import Embedding, OutputHead
from cluster.layers.span import Span


class VocabularyParallelEmbedding(Embedding):
    """Rows of all ranks' weights: each gives its own and zeros for the others', and they are summed.

    Attributes:
        rows: of the whole matrix that lie here; ``weight`` (V, D) may have more.
    """

    def __init__(self, rows: Span, padded_size: int, hidden_size: int, tp: Communicator) -> None:
        """
        Args:
            padded_size: V.
        """
        super().__init__(padded_size, hidden_size)
        self.rows = rows
        self._tp = tp

    def forward(self, input_ids_T: Tensor) -> Tensor:
        x_TD = kernels.embedding(input_ids_T, self.weight, first_id=self.rows.first)
        self._tp.all_reduce_(x_TD)
        return x_TD


class VocabularyParallelHead(OutputHead):
    """Logits of this rank's ids alone; 0 for the padding.

    Attributes:
        rows: of the whole matrix that lie here; ``weight`` (V, D) may have more.
    """

    def __init__(
        self, rows: Span, padded_size: int, hidden_size: int, *, tied_to: VocabularyParallelEmbedding | None = None
    ) -> None:
        super().__init__(padded_size, hidden_size, tied_to=tied_to)
        self.rows = rows
