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
from cluster.layers.row_parallel import RowParallelLinear
from cluster.layers.span import Span
from cluster.layers.vocabulary_parallel import VocabularyParallelEmbedding, VocabularyParallelHead
from cluster.models.tensor_source import TensorSource

_CHUNK_BYTES = 2**21  # of rows read at a time, in float32: more only takes memory
_ROW_STEP = 16  # rows are handed on in multiples of it, as packed matrices take them


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Rows and columns of a checkpoint's tensor.

    Attributes:
        name: of the tensor.
        rows: of a vector: numbers.
        columns: None: a vector.
    """

    name: str
    rows: Span
    columns: Span | None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return (self.rows.of,) if self.columns is None else (self.rows.of, self.columns.of)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parameter of the model, and what it is made of.

    Attributes:
        name: of the parameter in the model.
        parts: of the checkpoint's tensors, one below the other; all have the same columns. Rows below the last one are
            zeros.
        shape: of the parameter.
        is_vocabulary: whether its rows are the vocabulary's: an embedding or an output head.
        owners: modules that hold it and what it is called there; several where weights are tied.
    """

    name: str
    parts: tuple[TensorPart, ...]
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

    @property
    def columns(self) -> Span | None:
        """Of the checkpoint's matrices; None: it is a vector."""
        return self.parts[0].columns

    def chunks(self, source: TensorSource) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the whole parameter, a few at a time and each a multiple of 16 but the last."""
        row_numbers = math.prod(self.shape[1:])
        step = max(_ROW_STEP, _CHUNK_BYTES // (4 * row_numbers) // _ROW_STEP * _ROW_STEP)
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            pieces, start = [], 0
            for part in self.parts:
                low, high = max(first, start), min(last, start + part.rows.size)
                if low < high:
                    offset = part.rows.first - start
                    rows = Span(low + offset, high + offset, part.rows.of)
                    pieces.append(source.read(part.name, rows, part.columns))
                start += part.rows.size
            if start < last:
                pieces.append(torch.zeros(last - max(first, start), *self.shape[1:]))
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
                targets[parameter] = Target(
                    name=full_name,
                    parts=_parts(prefix, module, name, parameter),
                    shape=tuple(parameter.shape),
                    is_vocabulary=isinstance(module, Embedding | OutputHead),
                )
            targets[parameter].owners.append((module, name))
    return list(targets.values()), tied


def stored_shapes(targets: list[Target]) -> dict[str, tuple[int, ...]]:
    """Name to shape of the checkpoint's tensors that the targets are made of."""
    return {part.name: part.stored_shape for target in targets for part in target.parts}


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


def _parts(prefix: str, module: nn.Module, name: str, parameter: nn.Parameter) -> tuple[TensorPart, ...]:
    """What the parameter ``name`` of ``module``, found at ``prefix``, is made of."""
    columns = Span.whole(parameter.shape[1]) if parameter.ndim == 2 else None
    match module:
        case MergedLinear():
            parent = prefix.rpartition(".")[0]
            return tuple(TensorPart(f"{parent}.{part}.{name}", rows, columns) for part, rows in module.parts.items())
        case VocabularyParallelEmbedding() | VocabularyParallelHead():
            rows = module.rows
        case _:
            rows = Span.whole(parameter.shape[0])
            if isinstance(module, RowParallelLinear) and columns is not None:
                columns = module.columns
    return (TensorPart(f"{prefix}.{name}", rows, columns),)
