"""Collectives between processes over one segment of shared memory; ``src/collective.c``.

The ops return nothing, so that they can be recorded: what went wrong is in the segment, see ``Failure``. Addresses are
those of contiguous tensors.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch

from cluster.kernels.cpu.library import Op, library

MAX_RANKS = 32

FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What can be summed, by its number in C."""

_P, _I = ctypes.c_void_p, ctypes.c_int64


class Member(ctypes.Structure):
    """A rank's view of a segment; ``member`` in C.

    Attributes:
        segment: address of the mapping; None: closed, every op returns at once.
        timeout_ns: how long an op waits for others.
    """

    _fields_ = (("segment", _P), ("rank", _I), ("size", _I), ("timeout_ns", _I))


class FailureKind(IntEnum):
    LATE = 1
    """Ranks were waited for in vain."""
    ABORTED = 2
    DISAGREE = 3
    """Ranks called another op, or one with other sizes."""
    DUPLICATE = 4
    """A rank joined twice."""
    FOREIGN = 5
    """The segment is one of other ranks or of another version."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a segment is of no use any more.

    Attributes:
        found_by: the rank that says so.
        ranks: those that it is about.
    """

    kind: FailureKind
    found_by: int
    ranks: tuple[int, ...]


def failure_of(word: int) -> Failure:
    """What the first eight bytes of a segment say, if they are not zero."""
    mask = word >> 32
    return Failure(
        FailureKind(word & 0xFF), word >> 8 & 0xFF, tuple(rank for rank in range(MAX_RANKS) if mask >> rank & 1)
    )


def segment_bytes(size: int) -> int:
    """Bytes of a segment for ``size`` ranks; all zeros at first."""
    num_bytes = ctypes.c_int64()
    functions().segment_bytes(size, ctypes.addressof(num_bytes))
    return num_bytes.value


@dataclass(frozen=True, slots=True)
class Functions:
    """The ops; each takes the address of a Member first."""

    segment_bytes: Op
    segment_join: Op
    segment_abort: Op
    all_reduce: Op
    all_gather: Op
    all_to_all: Op
    broadcast: Op
    barrier: Op
    send: Op
    recv: Op


@cache
def functions() -> Functions:
    """
    Raises:
        RuntimeError: the library is not compiled.
    """
    found = library()
    if found is None:
        raise RuntimeError("the CPU kernels are not compiled")
    return Functions(
        segment_bytes=found.function("segment_bytes", _I, _P),
        segment_join=found.function("segment_join", _P),
        segment_abort=found.function("segment_abort", _P),
        all_reduce=found.function("all_reduce", _P, _P, _I, _I),
        all_gather=found.function("all_gather", _P, _P, _I, _P),
        all_to_all=found.function("all_to_all", _P, _P, _I, _P),
        broadcast=found.function("broadcast", _P, _P, _I, _I),
        barrier=found.function("barrier", _P),
        send=found.function("send", _P, _P, _I, _I),
        recv=found.function("recv", _P, _P, _I, _I),
    )
