"""Collectives between ranks of one host, through shared memory."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import stat
import sys
import threading
from pathlib import Path

from torch import Tensor

from cluster.distributed.communicator import PeerLost
from cluster.distributed.tensors import check_contiguous, check_like, check_peer, check_rank, rank_names
from cluster.errors import ConfigError
from cluster.kernels.cpu.collective import (
    FLOAT_TYPES,
    MAX_RANKS,
    Failure,
    FailureKind,
    Member,
    failure_of,
    functions,
    segment_bytes,
)
from cluster.kernels.cpu.library import library

_FOLDER = Path("/dev/shm")
_PREFIX = "cluster-segment-"


def segment_path() -> str:
    """Where a new group's segment may lie: give it to all ranks. The file is there only until all have joined."""
    return str(_FOLDER / f"{_PREFIX}{secrets.token_hex(8)}")


class ShmCommunicator:
    """A Communicator over one shared segment of memory; see ``kernels/cpu/src/collective.c``.

    ``all_reduce_`` takes float32, bfloat16 and float16 (summed in float32, rounded once), all else any dtype. ``send``
    buffers up to a mebibyte divided by the ranks. Every op waits ``timeout_s`` at most for ranks that do not come;
    then the group is of no use any more, on all ranks. Ops can be recorded in programs (``kernels/cpu/program.py``):
    there they return without a word when they fail, and ``check`` raises.
    """

    @staticmethod
    def available() -> bool:
        """Whether this machine can: Linux, with the C kernels."""
        return sys.platform == "linux" and _FOLDER.is_dir() and library() is not None

    def __init__(self, path: str, rank: int, size: int, *, timeout_s: float) -> None:
        """Joins the group; returns when all ranks have.

        Args:
            path: of the segment, the same for all ranks and used by no group before, as ``segment_path`` gives it.
                Whoever comes first makes the file; it is gone again when all have come, or when they gave up.
            timeout_s: of joining, and of every op afterwards.

        Raises:
            PeerLost: ranks did not come in time.
            ConfigError: more ranks than a segment has room for, or no memory for one, or a file that is none of ours.
        """
        if not 1 <= size <= MAX_RANKS:
            raise ConfigError(f"a group in shared memory has 1 to {MAX_RANKS} ranks, not {size}: use gloo for more")
        self.rank = rank
        self.size = size
        self._timeout_s = timeout_s
        self._functions = functions()
        self._lock = threading.Lock()  # of closing and aborting
        self._mapping: mmap.mmap | None = None
        _remove_orphans(Path(path).parent)
        file = _open(path)
        try:
            self._mapping = _map(file, path, segment_bytes(size))
            self._window: ctypes.Array[ctypes.c_char] | None = (ctypes.c_char * len(self._mapping)).from_buffer(
                self._mapping
            )
            segment = ctypes.addressof(self._window)
            self._failure = ctypes.c_uint64.from_address(segment)
            self._member = Member(segment, rank, size, int(timeout_s * 1e9))
            self._address = ctypes.addressof(self._member)
            self._functions.segment_join(self._address)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self.check()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(file)

    def all_reduce_(self, x: Tensor) -> None:
        if x.dtype not in FLOAT_TYPES:
            raise ValueError(f"sums are of {', '.join(map(str, FLOAT_TYPES))}; got {x.dtype}")
        self._functions.all_reduce(self._address, _address(x), x.numel(), FLOAT_TYPES[x.dtype])
        self.check()

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        check_like(out, x.dtype, (self.size, *x.shape))
        self._functions.all_gather(self._address, _address(x), x.nbytes, _address(out))
        self.check()

    def all_to_all(self, x: Tensor, out: Tensor) -> None:
        check_like(x, x.dtype, (self.size, *x.shape[1:]))
        check_like(out, x.dtype, tuple(x.shape))
        self._functions.all_to_all(self._address, _address(x), x.nbytes // self.size, _address(out))
        self.check()

    def broadcast_(self, x: Tensor, root: int) -> None:
        check_rank(root, self.size)
        self._functions.broadcast(self._address, _address(x), x.nbytes, root)
        self.check()

    def send(self, x: Tensor, to_rank: int) -> None:
        check_peer(to_rank, self.rank, self.size)
        self._functions.send(self._address, _address(x), x.nbytes, to_rank)
        self.check()

    def recv(self, out: Tensor, from_rank: int) -> None:
        check_peer(from_rank, self.rank, self.size)
        self._functions.recv(self._address, _address(out), out.nbytes, from_rank)
        self.check()

    def barrier(self) -> None:
        self._functions.barrier(self._address)
        self.check()

    def check(self) -> None:
        if self._mapping is None:
            raise PeerLost("the communicator is closed")
        if self._failure.value:
            failure = failure_of(self._failure.value)
            raise PeerLost(self._message(failure), failure.ranks)

    def abort(self) -> None:
        with self._lock:
            if self._mapping is not None:
                self._functions.segment_abort(self._address)

    def close(self) -> None:
        with self._lock:
            if self._mapping is None:
                return
            mapping, self._mapping = self._mapping, None
            self._member.segment = None  # for programs that are run once more
            self._window = None  # the mapping cannot go before what looks into it
            mapping.close()

    def _message(self, failure: Failure) -> str:
        ranks = rank_names(failure.ranks)
        match failure.kind:
            case FailureKind.LATE:
                return f"{ranks} did not come within {self._timeout_s:g} s, says rank {failure.found_by} of {self.size}"
            case FailureKind.ABORTED:
                return f"rank {failure.found_by} of {self.size} has aborted the group"
            case FailureKind.DISAGREE:
                return f"{ranks} called another operation, or with other sizes, than rank {failure.found_by}"
            case FailureKind.DUPLICATE:
                return f"{ranks} joined twice: every process needs a rank of its own"
            case FailureKind.FOREIGN:
                return f"rank {failure.found_by} joined a segment of another version or number of ranks"


def _open(path: str) -> int:
    """The file with a shared lock on it, which says that somebody needs it; made if it is not there."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_SH)  # kept from us for moments only, by whoever looks for orphans
        status = os.fstat(file)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077 or not stat.S_ISREG(status.st_mode):
            os.close(file)
            raise ConfigError(f"{path} is not a file of this user alone: no place for a group's memory")
        if status.st_nlink > 0:
            return file
        os.close(file)  # removed between the two calls


def _map(file: int, path: str, num_bytes: int) -> mmap.mmap:
    present = os.fstat(file).st_size
    if present not in (0, num_bytes):
        raise ConfigError(f"{path} has {present} bytes where the segment of this group has {num_bytes}")
    try:
        os.posix_fallocate(file, 0, num_bytes)  # a write without memory behind it would kill the process
        return mmap.mmap(file, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except OSError as error:
        raise ConfigError(
            f"no {num_bytes} bytes of shared memory for a group's segment ({error}): make {_FOLDER} larger "
            f"(containers: --shm-size), or choose the communicator gloo"
        ) from error


def _remove_orphans(folder: Path) -> None:
    """Removes segments whose ranks were all killed before the last had joined: nobody holds a lock on them."""
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # gone, not ours, or in use
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(file)


def _address(x: Tensor) -> int:
    check_contiguous(x)
    return x.data_ptr()
