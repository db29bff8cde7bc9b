"""Where weights come from: the safetensors files of a checkpoint, read a few rows at a time, or random numbers.

Files are read, not mapped: pages of a mapped file count as this process's memory for as long as they are looked at, and
a model's weights would be there twice while it is packed.
"""

from __future__ import annotations

import json
import math
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.layers.span import Span
from cluster.models.config import ConfigFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorSource(Protocol):
    """Tensors by their names in a checkpoint.

    Attributes:
        num_bytes_read: of a checkpoint's tensors, so far.
    """

    num_bytes_read: int

    def check(self, wanted: Mapping[str, tuple[int, ...]], ignored: Iterable[str]) -> None:
        """Raises CheckpointError unless exactly ``wanted``, name to shape, are there, and perhaps ``ignored``."""

    def read(self, name: str, rows: Span, columns: Span | None) -> Tensor:
        """Rows and columns (of a vector: numbers; no columns) of the tensor, of any float type. Thread-safe."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        offset: of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class CheckpointTensors:
    """The safetensors files of a directory. A context manager; leaving it closes the files.

    Attributes:
        num_bytes_read: of tensors, headers not counted.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Reads the files' headers.

        Raises:
            CheckpointError: there are no files, or one is broken or holds what is no weight.
        """
        self._checkpoint = checkpoint
        self._descriptors: dict[Path, int] = {}
        self._stored: dict[str, StoredTensor] = {}
        for file in weight_files(checkpoint):
            for name, tensor in stored_tensors(file).items():
                if name in self._stored:
                    raise CheckpointError(f"{file}: tensor {name} is stored twice, here and in another file")
                self._stored[name] = tensor
        self._lock = threading.Lock()
        self.num_bytes_read = 0

    def __enter__(self) -> CheckpointTensors:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def num_weights(self) -> int:
        """Numbers stored in all files."""
        return sum(math.prod(tensor.shape) for tensor in self._stored.values())

    def are_all(self, dtype: torch.dtype) -> bool:
        """Whether every tensor is stored in ``dtype``."""
        return all(tensor.dtype == dtype for tensor in self._stored.values())

    def check(self, wanted: Mapping[str, tuple[int, ...]], ignored: Iterable[str]) -> None:
        ignored, unexpected = set(ignored), []
        for name, tensor in self._stored.items():
            if name in wanted:
                if tensor.shape != wanted[name]:
                    raise CheckpointError(
                        f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}; config.json asks for "
                        f"{list(wanted[name])}"
                    )
            elif name not in ignored and not name.endswith(".rotary_emb.inv_freq"):  # older ones store what is derived
                unexpected.append(f"{name} ({tensor.file.name})")
        if missing := wanted.keys() - self._stored.keys():
            raise CheckpointError(f"{self._checkpoint}: {_listing(missing)} missing from the safetensors files")
        if unexpected:
            raise CheckpointError(
                f"{self._checkpoint}: {_listing(unexpected)} in the safetensors files but not in the model that "
                f"config.json describes"
            )

    def read(self, name: str, rows: Span, columns: Span | None) -> Tensor:
        tensor = self._stored[name]
        columns = columns or Span.whole(1)
        if columns.size == columns.of:
            num_pieces, piece, stride = 1, rows.size * columns.of, 0
        else:  # what lies between the rows' pieces is not read
            num_pieces, piece, stride = rows.size, columns.size, columns.of
        item, descriptor = tensor.dtype.itemsize, self._descriptor(tensor.file)
        data = torch.empty(num_pieces * piece * item, dtype=torch.uint8)
        memory = memoryview(data.numpy())
        start = tensor.offset + (rows.first * columns.of + columns.first) * item
        for index in range(num_pieces):
            part = memory[index * piece * item : (index + 1) * piece * item]
            _read(descriptor, part, start + index * stride * item, tensor.file)
        with self._lock:
            self.num_bytes_read += len(memory)
        numbers = data.view(tensor.dtype)
        return numbers if len(tensor.shape) == 1 else numbers.view(rows.size, columns.size)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]


class RandomTensors:
    """Made-up weights, for measurements that need a model's size and not its words: normal with deviation 0.02, those
    of norms 1 and biases 0. The same name gives the same numbers.

    Numbers repeat: a fresh one for each weight of a large model would take minutes.
    """

    num_bytes_read = 0

    _PERIOD = 2**20 - 3  # odd, so that rows of the usual lengths do not repeat

    def __init__(self) -> None:
        self._numbers = torch.randn(self._PERIOD, generator=torch.Generator().manual_seed(0)).mul_(0.02)

    def check(self, wanted: Mapping[str, tuple[int, ...]], ignored: Iterable[str]) -> None:
        """Everything is there."""

    def read(self, name: str, rows: Span, columns: Span | None) -> Tensor:
        if columns is None:
            return torch.full((rows.size,), 0.0 if name.endswith(".bias") else 1.0)
        # Where a number lies in the whole tensor is what it depends on: parts of a matrix hold what the whole does.
        start = (zlib.crc32(name.encode()) + rows.first * columns.of) % self._PERIOD
        count = rows.size * columns.of
        repeats = -(-(start + count) // self._PERIOD)
        whole_rows = self._numbers.repeat(repeats)[start : start + count].view(rows.size, columns.of)
        return whole_rows[:, columns.first : columns.last]


def read_into(descriptor: int, data: Tensor, offset: int, file: Path) -> None:
    """Fills ``data`` (uint8) with the file's bytes from ``offset`` on.

    Raises:
        CheckpointError: the file is shorter, or the disk failed.
    """
    _read(descriptor, memoryview(data.numpy()), offset, file)


def _read(descriptor: int, memory: memoryview, offset: int, file: Path) -> None:
    done = 0
    try:
        while done < len(memory):
            count = os.preadv(descriptor, [memory[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{file} ends at byte {offset + done}: it was cut short while it was read")
            done += count
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files, single or sharded.

    Raises:
        CheckpointError: there are none, or the index names one that is not there.
    """
    if (checkpoint / _SINGLE).is_file():
        return [checkpoint / _SINGLE]
    if (checkpoint / _INDEX).is_file():
        return [checkpoint / name for name in sorted(set(_weight_map(checkpoint).values()))]
    if pickles := sorted(path.name for path in checkpoint.glob("*.bin")):
        raise CheckpointError(
            f"{checkpoint} holds pickled weights only ({', '.join(pickles[:3])}), which can run code when loaded: "
            f"convert them to safetensors (save_pretrained of transformers does)"
        )
    raise CheckpointError(f"{checkpoint} has no weights: neither {_SINGLE} nor {_INDEX} is there")


def read_header(file: Path) -> bytes:
    """A safetensors file's header, as it is stored: its length in 8 bytes, then as many of JSON."""
    with file.open("rb") as stored:
        length = stored.read(8)
        return length + stored.read(int.from_bytes(length, "little"))


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name. Raises CheckpointError where it is broken, or holds what is no weight."""
    try:
        # Checks the header: sizes, offsets and the file's length belong together.
        with safe_open(file, framework="pt", device="cpu"):
            header = read_header(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no complete safetensors file: {error}") from error
    tensors = {}
    for name, entry in json.loads(header[8:]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{file}: tensor {name} is stored as {entry['dtype']}; it must be one of {', '.join(_DTYPES)}"
            )
        offset = len(header) + entry["data_offsets"][0]
        tensors[name] = StoredTensor(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), offset)
    return tensors


def _weight_map(checkpoint: Path) -> dict[str, str]:
    index = ConfigFile.read(checkpoint / _INDEX)
    if not index.has("weight_map"):
        raise index.error("weight_map", "is missing")
    weight_map = index.sub("weight_map").values
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise index.error(f"weight_map.{name}", f"is {file!r}; it must be the name of a file beside the index")
        if not (checkpoint / file).is_file():
            raise index.error(f"weight_map.{name}", f"names {file}, which is not there: the download is incomplete")
    return dict(weight_map)


def _listing(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    rest = len(names) - limit
    more = f" and {rest} more" if rest > 0 else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {', '.join(names[:limit])}{more}"
