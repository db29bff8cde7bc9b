"""A model's weights as the CPU kernels read them: every parameter packed, all of them in one piece of memory.

One piece, because it is what a cached copy on disk holds: it is read back by a few large reads, into huge pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.kernels.cpu import linear, memory
from cluster.kernels.cpu.linear import PackedWeight, WeightFormat
from cluster.layers.span import Span
from cluster.models.tensor_source import TensorSource
from cluster.models.weight_cache import CacheKey, WeightCache
from cluster.models.weights import Target

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """A parameter's place.

    Attributes:
        format: of a matrix; None: a vector (norm or bias), float32.
        group_size: as in ``PackedWeight``; 0 for a vector.
        offset, num_bytes: in the model's memory; the offset is a multiple of 64.
    """

    target: Target
    format: WeightFormat | None
    group_size: int
    offset: int
    num_bytes: int


class PackedLayout:
    """Where every parameter of a model lies.

    Attributes:
        num_bytes: of all of them.
    """

    def __init__(self, targets: list[Target], weights: WeightFormat) -> None:
        """
        Args:
            weights: format of the matrices; of int4, some are int8 (``Target.quantized_format``).
        """
        self.weights = weights
        self.entries: list[PackedEntry] = []
        offset = 0
        for target in targets:
            format = _format_of(target, weights)
            if format is None or target.columns is None:
                group_size, num_bytes = 0, 4 * target.shape[0]
            else:
                group_size = _group_size_of(target.columns, format)
                num_bytes = linear.num_bytes(format, *target.shape, group_size=group_size)
            self.entries.append(PackedEntry(target, format, group_size, offset, num_bytes))
            offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = offset

    def header(self, metadata: dict[str, str]) -> bytes:
        """The header of a safetensors file of this layout: the parameters in order, as bytes, padding included.

        Its metadata say how each is packed, so that a copy made in another way has another header.
        """
        packing = ",".join(f"{entry.format}/{entry.group_size}" for entry in self.entries)
        metadata = metadata | {
            "weights": self.weights,
            "layout_version": str(linear.LAYOUT_VERSION),
            "packing": hashlib.sha256(packing.encode()).hexdigest(),
        }
        index: dict[str, object] = {"__metadata__": metadata}
        ends = [entry.offset for entry in self.entries[1:]] + [self.num_bytes]
        for entry, end in zip(self.entries, ends, strict=True):
            span = [entry.offset, end]
            index[entry.target.name] = {"dtype": "U8", "shape": [end - entry.offset], "data_offsets": span}
        text = json.dumps(index, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)  # the data stays aligned
        return len(text).to_bytes(8, "little") + text


def load_packed(
    layout: PackedLayout, source: TensorSource, *, num_threads: int, cache: tuple[WeightCache, CacheKey] | None
) -> None:
    """Packs every parameter, a few rows of the source at a time, or takes the copy that an earlier load has cached.

    Args:
        cache: where copies are, and what this model's is called there; None: not cached.
    """
    data = memory.zeros(layout.num_bytes)
    header = b"" if cache is None else layout.header(cache[1].metadata)
    if cache is None or not cache[0].read(cache[1], header, data, num_threads=num_threads):
        with ThreadPoolExecutor(num_threads) as pool:
            for done in [pool.submit(_pack, entry, source, data) for entry in layout.entries]:
                done.result()
        if cache is not None:
            cache[0].write(cache[1], header, data)
    for entry, value in _values(layout, data):
        entry.target.put(value)


def _format_of(target: Target, weights: WeightFormat) -> WeightFormat | None:
    if not target.is_matrix:
        return None
    return target.quantized_format(weights) if weights in ("int8", "int4") else weights


def _group_size_of(columns: Span, format: WeightFormat) -> int:
    """That of the whole matrix, where these are cut out between groups."""
    group_size = linear.default_group_size(format, columns.of)
    is_between = columns.first % group_size == 0 and (columns.last % group_size == 0 or columns.last == columns.of)
    return group_size if is_between else linear.default_group_size(format, columns.size)


def _pack(entry: PackedEntry, source: TensorSource, data: Tensor) -> None:
    value = _value(entry, data)
    for first, rows in entry.target.chunks(source):
        if isinstance(value, PackedWeight):
            value.pack_rows(first, rows)
        else:
            value[first : first + len(rows)].copy_(rows)


def _values(layout: PackedLayout, data: Tensor) -> Iterator[tuple[PackedEntry, PackedWeight | Tensor]]:
    for entry in layout.entries:
        yield entry, _value(entry, data)


def _value(entry: PackedEntry, data: Tensor) -> PackedWeight | Tensor:
    part = data[entry.offset : entry.offset + entry.num_bytes]
    if entry.format is None:
        return part.view(torch.float32)
    return PackedWeight(entry.format, *entry.target.shape, entry.group_size, part)
