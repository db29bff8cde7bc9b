"""Quantized copies of checkpoints on disk, so that a model is packed once and not at every start.

A copy is a safetensors file of bytes. What tells it from a foreign, stale or broken one is its header: it must be, byte
for byte, the one that this version would write for this checkpoint, and the file must be as long as it says. The data
have no checksum of their own: a copy gets its name only when it is whole and on the disk, so what is left is what the
disk itself loses, against which the checkpoint has no more; and summing up half a gigabyte takes as long as reading it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cluster.errors import CheckpointError
from cluster.models.tensor_source import read_header, read_into, weight_files

_log = logging.getLogger(__name__)

_READ_BYTES = 2**25
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_DISK_RESERVE_BYTES = 2**30
_ABANDONED_S = 3600.0
_SUFFIX, _TEMPORARY = ".safetensors", ".part"


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What a copy is of.

    Attributes:
        checkpoint: digest of the checkpoint's files.
        weights: format of the matrices.
        part: name of a rank's part of the model; empty: all of it.
    """

    checkpoint: str
    weights: str
    part: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        part = {"part": self.part} if self.part else {}
        return {"format": "llm-cluster packed weights", "checkpoint": self.checkpoint} | part


def checkpoint_digest(checkpoint: Path) -> str:
    """Of the weight files' names, sizes, times of change, headers, and 64 short samples of each.

    Not of all their bytes, which takes as long as packing them. Size and time tell an edited file, even where one
    number changed; the samples tell two fine-tunes of one model apart where times mean nothing, as in container images
    that set them all alike.
    """
    digest = hashlib.sha256()
    for file in weight_files(checkpoint):
        status = file.stat()
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        digest.update(read_header(file))
        with file.open("rb") as stored:
            for index in range(_SAMPLES):
                stored.seek(index * max(0, status.st_size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(stored.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


class WeightCache:
    """A directory of copies. Processes may share it: copies appear whole, under their final name, and never change.

    Attributes:
        directory: made when the first copy is written.
        max_bytes: of all copies together; those used longest ago make room for new ones.
    """

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes

    def path(self, key: CacheKey) -> Path:
        name = f"{key.weights}-{key.part}" if key.part else key.weights
        return self.directory / key.checkpoint / f"{name}{_SUFFIX}"

    def read(self, key: CacheKey, header: bytes, data: Tensor, *, num_threads: int) -> bool:
        """Fills ``data`` (uint8) with the copy's bytes; False: there is none that can be used, and ``data``, given as
        zeros, is so still.

        Args:
            header: that the copy must have.
        """
        path = self.path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            _log.warning("the cached weights cannot be opened, the checkpoint is read instead: %s", error)
            return False
        try:
            size = os.fstat(descriptor).st_size
            if size != len(header) + len(data) or os.pread(descriptor, len(header), 0) != header:
                _log.warning("%s is not what this version writes for this checkpoint; it is made anew", path)
                return False
            with ThreadPoolExecutor(num_threads) as pool:
                parts = range(0, len(data), _READ_BYTES)
                for done in [
                    pool.submit(read_into, descriptor, data[part : part + _READ_BYTES], len(header) + part, path)
                    for part in parts
                ]:
                    done.result()
            _touch(path)
            return True
        except (CheckpointError, OSError) as error:
            _log.warning("the cached weights cannot be read, the checkpoint is read instead: %s", error)
            data.zero_()
            return False
        finally:
            os.close(descriptor)

    def write(self, key: CacheKey, header: bytes, data: Tensor) -> None:
        """Keeps ``data`` under ``key``. Where that fails, a log line says so: the next start packs again."""
        path, num_bytes = self.path(key), len(header) + len(data)
        temporary = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._make_room(num_bytes, path):
                return
            descriptor, temporary = tempfile.mkstemp(_TEMPORARY, f".{path.stem}.", path.parent)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for part in (memoryview(header), memoryview(data.numpy())):
                    while part:
                        part = part[file.write(part[:_READ_BYTES]) :]
                os.fsync(descriptor)
            os.replace(temporary, path)
            _sync(path.parent)
        except OSError as error:
            _log.warning("the quantized weights are not cached, every start quantizes them anew: %s", error)
            if temporary:
                Path(temporary).unlink(missing_ok=True)

    def _make_room(self, num_bytes: int, path: Path) -> bool:
        """Removes copies, those used longest ago first, until ``num_bytes`` fit; whether they do."""
        if num_bytes > self.max_bytes:
            _log.info("%d bytes of quantized weights are more than the cache may hold; they are not kept", num_bytes)
            return False
        self._remove_abandoned()
        copies = sorted((copy for copy in self._copies() if copy.path != path), key=lambda copy: copy.used_s)
        held = sum(copy.num_bytes for copy in copies)
        for copy in copies:
            if held + num_bytes <= self.max_bytes and self._free() >= num_bytes + _DISK_RESERVE_BYTES:
                break
            copy.path.unlink(missing_ok=True)
            held -= copy.num_bytes
        if self._free() < num_bytes + _DISK_RESERVE_BYTES:
            _log.warning("%s has no room for %d bytes of quantized weights; every start quantizes them anew",
                         self.directory, num_bytes)  # fmt: skip
            return False
        return True

    def _free(self) -> int:
        return shutil.disk_usage(self.directory).free

    def _copies(self) -> Iterator[_Copy]:
        for path in self.directory.glob(f"*/*{_SUFFIX}"):
            try:
                status = path.stat()
            except OSError:  # another process has just removed it
                continue
            yield _Copy(path, status.st_size, status.st_mtime)

    def _remove_abandoned(self) -> None:
        """Half copies of processes that were killed while they wrote."""
        for path in self.directory.glob(f"*/.*{_TEMPORARY}"):
            try:
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()
            except OSError:  # another process has just renamed or removed it
                continue


@dataclass(frozen=True, slots=True)
class _Copy:
    path: Path
    num_bytes: int
    used_s: float


def _touch(path: Path) -> None:
    """Marks a copy as used now. On a read-only file system its age stays."""
    try:
        os.utime(path)
    except OSError:
        return


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
