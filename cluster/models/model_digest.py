"""A name for what a model computes, the same wherever it is stored."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

from cluster.errors import CheckpointError
from cluster.models.tensor_source import StoredTensor, stored_tensors, weight_files

_MAX_SAMPLES, _SAMPLE_BYTES = 1024, 4096


def model_digest(checkpoint: Path, *, with_weights: bool = True) -> str:
    """Digest of config.json and of the tensors: their names, types, shapes and a short sample of each, of a thousand of
    them where there are more.

    Not of all their bytes, which may take minutes to read. Training moves every number of a matrix, so the samples tell
    versions of a model apart; an edit of a few numbers by hand they may miss. How tensors are spread over files, and
    what the files are called, does not matter.

    Args:
        with_weights: False: of config.json alone, for weights that are made up from it.

    Raises:
        CheckpointError: a file cannot be read; the message names it.
    """
    digest = hashlib.sha256()
    _absorb(digest, _read(checkpoint / "config.json"))
    if with_weights:
        stored = {name: tensor for file in weight_files(checkpoint) for name, tensor in stored_tensors(file).items()}
        tensors = sorted(stored.items())
        for name, tensor in tensors:
            _absorb(digest, f"{name} {tensor.dtype} {tensor.shape}".encode())
        for _, tensor in tensors[:: -(-len(tensors) // _MAX_SAMPLES) or 1]:
            _absorb(digest, _sample(tensor))
    return digest.hexdigest()[:32]


def _absorb(digest: hashlib._Hash, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little") + data)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _sample(tensor: StoredTensor) -> bytes:
    """Out of its middle: first rows are often padding."""
    num_bytes = math.prod(tensor.shape) * tensor.dtype.itemsize
    size = min(num_bytes, _SAMPLE_BYTES)
    try:
        with tensor.file.open("rb", buffering=0) as stored:
            return os.pread(stored.fileno(), size, tensor.offset + (num_bytes - size) // 2)
    except OSError as error:
        raise CheckpointError(f"{tensor.file} cannot be read: {error}") from error
