"""A step recorded once and run again by one call.

A small model's decode step is a few hundred short ops: preparing each of them in Python costs as much as running it. So
the calls of one step are written down with the addresses they read and write, and run again from C, as a CUDA graph is.
What changes from step to step (tokens, positions, block tables) changes in place, in the arrays that were read.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.kernels.cpu import memory
from cluster.kernels.cpu.library import Library, Op

T = TypeVar("T")

_ALIGNMENT = 64


class NotRecordable(Exception):
    """The step does something else than calling recordable ops on memory that stays."""


class Arena:
    """Memory that the intermediate results of all programs share; no two of them may run at the same time.

    Args:
        num_bytes: the most that one program may use; takes memory as it is written.
    """

    def __init__(self, num_bytes: int) -> None:
        self.memory: np.ndarray = memory.zeros(num_bytes).numpy()


class Program(Generic[T]):
    """The calls of one step.

    Attributes:
        result: what the recorded function returned; every run overwrites its tensors.
    """

    def __init__(self, library: Library, calls: list[tuple[Op, tuple[int | float | None, ...]]], result: T) -> None:
        self.result = result
        self._library = library
        cells: list[bytes] = []
        table = np.zeros((len(calls), 2), dtype=np.int64)
        for index, (op, arguments) in enumerate(calls):
            table[index] = op.replay, len(cells)
            cells.extend(map(_cell, op.argtypes, arguments))
        self._calls, self._cells = table, np.frombuffer(b"".join(cells), dtype=np.int64)

    def run(self) -> T:
        """Runs the calls again and returns ``result``."""
        self._library.run_program(self._calls.ctypes.data, len(self._calls), self._cells.ctypes.data)
        return self.result


def record(library: Library, arena: Arena, step: Callable[[], T]) -> Program[T]:
    """Runs ``step`` and writes its calls down.

    Tensors that ``step`` makes lie in ``arena``; all others that its calls touch must live, and stay where they are, as
    long as the program.

    Raises:
        NotRecordable: ``step`` computes with torch itself, calls an op without a twin, or needs more than the arena.
    """
    if Op.recorder is not None:
        raise NotRecordable("another program is being recorded")
    recording = _Recording(arena)
    Op.recorder = recording
    try:
        with recording:
            result = step()
    finally:
        Op.recorder = None
    return Program(library, recording.calls, result)


class _Recording(TorchDispatchMode):
    """Sees every call of an op and of torch while it is entered."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.calls: list[tuple[Op, tuple[int | float | None, ...]]] = []
        self._thread = threading.get_ident()
        self._arena = arena
        self._free = [(0, arena.memory.nbytes)]  # (start, stop), in order, none touching another

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler, to keep it out of this class: a second and 140 MB for nothing."""
        return False

    def called(self, op: Op, arguments: tuple[int | float | None, ...]) -> None:
        if threading.get_ident() != self._thread:
            return
        if op.replay is None:
            raise NotRecordable("an op has no twin that takes its arguments as cells")
        self.calls.append((op, arguments))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = (kwargs or {}).get("dtype")
        if func is torch.ops.aten.empty.memory_format:
            return self._empty(args[0], dtype or torch.get_default_dtype())
        if func is torch.ops.aten.empty_like.default:
            return self._empty(args[0].shape, dtype or args[0].dtype)
        if not func.is_view:
            raise NotRecordable(f"{func} computes with torch itself")
        return func(*args, **(kwargs or {}))

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = max(1, math.prod(shape)) * dtype.itemsize
        span = -(-size // _ALIGNMENT) * _ALIGNMENT
        index = next((i for i, (start, stop) in enumerate(self._free) if stop - start >= span), None)
        if index is None:
            raise NotRecordable(f"the arena of {self._arena.memory.nbytes} bytes is full")
        start, stop = self._free[index]
        self._free[index : index + 1] = [(start + span, stop)] if stop - start > span else []
        part = self._arena.memory[start : start + size]
        # The storage holds the array: when the last view of it is gone, later results may lie there.
        weakref.finalize(part, self._release, start, start + span)
        return torch.from_numpy(part).view(dtype)[: math.prod(shape)].view(shape)

    def _release(self, start: int, stop: int) -> None:
        spans = sorted([*self._free, (start, stop)])
        merged = [spans[0]]
        for low, high in spans[1:]:
            if low == merged[-1][1]:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self._free = merged


def _cell(argtype: type, value: float | None) -> bytes:
    if argtype in (ctypes.c_float, ctypes.c_double):
        return bytes(ctypes.c_double(value or 0.0))
    return bytes(ctypes.c_int64(int(value or 0)))
