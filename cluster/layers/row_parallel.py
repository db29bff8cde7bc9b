"""A linear layer whose input is spread over ranks. T tokens, I inputs of this rank, O outputs."""

from __future__ import annotations

from torch import Tensor

from cluster import kernels
from cluster.distributed.communicator import Communicator
from cluster.layers.linear import Linear
from cluster.layers.span import Span


class RowParallelLinear(Linear):
    """Takes this rank's part of the input (T, I), gives the whole output (T, O): the ranks' products are summed.

    The first rank alone adds the bias, so that it is added once.

    Attributes:
        columns: of the whole matrix that lie here.
    """

    def __init__(self, columns: Span, out_features: int, tp: Communicator, *, bias: bool = False) -> None:
        super().__init__(columns.size, out_features, bias=bias and tp.rank == 0)
        self.columns = columns
        self._tp = tp

    def forward(self, x_TI: Tensor) -> Tensor:
        out_TO = kernels.linear(x_TI, self.weight, self.bias)
        self._tp.all_reduce_(out_TO)
        return out_TO
