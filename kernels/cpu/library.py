"""The compiled C kernels, found and bound once per process.

A library that was made from other sources than those beside it is rebuilt where there is a compiler, and refused where
there is none: the torch kernels serve then.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from typing import ClassVar, Protocol

from cluster.errors import ConfigError
from cluster.kernels.cpu.build import LIBRARY, BuildError, build_if_stale, instruction_sets

_log = logging.getLogger(__name__)

_ISA_VARIABLE = "CLUSTER_CPU_ISA"


class Op:
    """A compiled op. Calls release the interpreter's lock.

    Attributes:
        argtypes: ctypes of its arguments.
        replay: address of its twin that takes its arguments as cells (``src/program.h``); None: it cannot be recorded.
    """

    __slots__ = ("_function", "argtypes", "replay")

    recorder: ClassVar[Recorder | None] = None
    """Told of every call while a program is recorded."""

    def __init__(self, function: Callable[..., None], argtypes: tuple[type, ...], replay: int | None) -> None:
        self._function = function
        self.argtypes = argtypes
        self.replay = replay

    def __call__(self, *arguments: int | float | None) -> None:
        if Op.recorder is not None:
            Op.recorder.called(self, arguments)
        self._function(*arguments)


class Recorder(Protocol):
    def called(self, op: Op, arguments: tuple[int | float | None, ...]) -> None: ...


class Library:
    """The library with one instruction set chosen.

    Attributes:
        isa: ``avx512``, ``avxvnni``, ``avx2`` or ``portable``.
    """

    def __init__(self, handle: ctypes.CDLL, isa: str) -> None:
        self.isa = isa
        self._handle = handle
        self._set_num_threads = handle.pool_set_num_threads
        self._set_num_threads.argtypes = (ctypes.c_int32,)
        self._set_num_threads.restype = ctypes.c_int32
        self._run_program = handle.program_run
        self._run_program.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        self._run_program.restype = None

    def function(self, name: str, *argtypes: type) -> Op:
        """The op ``name`` as compiled for ``isa``."""
        bound = self._handle[f"{name}_{self.isa}"]
        bound.argtypes = argtypes
        bound.restype = None
        twin = getattr(self._handle, f"{name}_replay_{self.isa}", None)
        return Op(bound, argtypes, None if twin is None else ctypes.cast(twin, ctypes.c_void_p).value)

    def run_program(self, calls: int, num_calls: int, cells: int) -> None:
        """Runs recorded calls; the addresses are those of ``program_run`` in ``src/program.h``."""
        self._run_program(calls, num_calls, cells)

    def with_isa(self, isa: str) -> Library:
        """The same library with another instruction set.

        Raises:
            ConfigError: this machine does not have it.
        """
        available = self.available()
        if isa not in available:
            raise ConfigError(f"the instruction set {isa!r} is not one of this machine's: {', '.join(available)}")
        return Library(self._handle, isa)

    def available(self) -> tuple[str, ...]:
        """The instruction sets that this machine runs, best first."""
        return tuple(isa for isa in instruction_sets() if self._handle[f"has_{isa}"]())

    def set_num_threads(self, num_threads: int) -> int:
        """Sets the size of the process's pool, the caller counted; returns how many the system allows."""
        return int(self._set_num_threads(num_threads))

    def num_threads(self) -> int:
        return int(self._handle.pool_num_threads())


@functools.cache
def library() -> Library | None:
    """The library with this machine's best instruction set, or the one that CLUSTER_CPU_ISA names; None: there is none.

    Raises:
        ConfigError: CLUSTER_CPU_ISA names a set that this machine does not have.
    """
    handle = _opened()
    if handle is None:
        return None
    best = Library(handle, "portable")
    return best.with_isa(os.environ.get(_ISA_VARIABLE) or best.available()[0])


def _opened() -> ctypes.CDLL | None:
    try:
        # Before it is loaded: a stale library that is loaded once stays loaded in place of the fresh one.
        build_if_stale()
        handle = ctypes.CDLL(str(LIBRARY))
    except (BuildError, OSError) as error:
        _log.warning("the CPU kernels are not compiled, torch serves in their place: %s", error)
        return None
    return handle
