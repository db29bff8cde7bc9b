"""What a model's parameters are called in a checkpoint, and how a source's numbers get into them.

Models are built on torch's "meta" device: parameters have shapes and no memory. A loader puts a tensor, or a matrix as
the backend has packed it, in the place of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cluster.layers.embedding import Embedding, OutputHead
from cluster.layers.linear import MergedLinear
from cluster.models.tensor_source import TensorSource

_CHUNK_BYTES = 2**21  # of rows read at a time, in float32: more only takes memory
_ROW_STEP = 16  # rows are handed on in multiples of it, as packed matrices take them


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parameter of the model, under the names of the tensors that it is made of.

    Attributes:
        name: of the parameter in the model.
        parts: (name, rows) of the checkpoint's tensors that lie in it one below the other.
        shape: of the whole.
        is_vocabulary: whether its rows are the vocabulary's: an embedding or an output head.
        owners: modules that hold it and what it is called there; several where weights are tied.
    """

    name: str
    parts: tuple[tuple[str, int], ...]
    shape: tuple[int, ...]
    is_vocabulary: bool
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    def quantized_format(self, weights: Literal["int8", "int4"]) -> Literal["int8", "int4"]:
        """The format of this matrix in a model of such weights.

        Of int4, embedding and output head are int8. The embedded model loses 1.7 % of its bits per byte then over all
        held-out files (``demo.evaluate``); over 145 kB of them 2.2 %, against 2.9 % with these two in int4 as well.
        """
        return "int8" if self.is_vocabulary else weights

    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: (rows, *self.shape[1:]) for name, rows in self.parts}

    def chunks(self, source: TensorSource) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the whole parameter, a few at a time and each a multiple of 16 but the last."""
        row_numbers = math.prod(self.shape[1:])
        step = max(_ROW_STEP, _CHUNK_BYTES // (4 * row_numbers) // _ROW_STEP * _ROW_STEP)
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            pieces, start = [], 0
            for name, shape in self.part_shapes().items():
                low, high = max(first, start), min(last, start + shape[0])
                if low < high:
                    pieces.append(source.rows(name, shape, low - start, high - start))
                start += shape[0]
            yield first, pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def put(self, value: Any) -> None:
        """Puts ``value`` in the parameter's place."""
        for module, name in self.owners:
            delattr(module, name)  # a parameter's name takes nothing but parameters
            setattr(module, name, value)


def find_targets(model: nn.Module) -> tuple[list[Target], set[str]]:
    """(the parameters of ``model``, names that older checkpoints store though they are tied to another's)."""
    targets: dict[nn.Parameter, Target] = {}
    tied: set[str] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}"
            if parameter in targets:
                tied.add(full_name)
            else:
                parts: tuple[tuple[str, int], ...] = ((full_name, parameter.shape[0]),)
                if isinstance(module, MergedLinear):
                    parent = prefix.rpartition(".")[0]
                    parts = tuple((f"{parent}.{part}.{name}", rows) for part, rows in module.parts.items())
                targets[parameter] = Target(
                    name=full_name,
                    parts=parts,
                    shape=tuple(parameter.shape),
                    is_vocabulary=isinstance(module, Embedding | OutputHead),
                )
            targets[parameter].owners.append((module, name))
    return list(targets.values()), tied


def check_source(source: TensorSource, targets: list[Target], tied: set[str]) -> None:
    """Raises CheckpointError unless ``source`` has what the targets ask for, and nothing else."""
    wanted = {name: shape for target in targets for name, shape in target.part_shapes().items()}
    source.check(wanted, tied)


def load_dense(targets: list[Target], source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
    """Every parameter as a tensor of ``dtype`` on ``device``."""
    for target in targets:
        target.put(dense_tensor(target, source, dtype, device))


def dense_tensor(target: Target, source: TensorSource, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One parameter as a tensor of ``dtype`` on ``device``."""
    tensor = torch.empty(target.shape, dtype=dtype, device=device)
    for first, rows in target.chunks(source):
        tensor[first : first + len(rows)].copy_(rows)
    return tensor
