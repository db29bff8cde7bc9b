"""Memory for what every step reads whole, weights and KV blocks, and for its large results; on huge pages where the
system gives them.

A decode step streams all weights through the processor; on pages of 4 KiB it spends a good part of that time on looking
addresses up (measured on a 2-core server: 40 GB/s against 55 GB/s with pages of 2 MiB).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from cluster.kernels.cpu.library import Op

_HUGE_PAGE = 2**21
_CHUNK = 2**25  # matrices share chunks, so that small ones do not take a huge page each
_ALIGNMENT = 64  # a vector, and a line of the cache

_lock = threading.Lock()
_chunk = torch.empty(0, dtype=torch.uint8)  # what is left of the newest; a chunk lives as long as any part of it


def zeros(num_bytes: int) -> Tensor:
    """uint8, aligned to 64 bytes. Takes memory as it is written, not now."""
    size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    if size >= _CHUNK:
        return _mapped(size)[:num_bytes]
    global _chunk
    with _lock:
        if _chunk.numel() < size:
            _chunk = _mapped(_CHUNK)
        taken, _chunk = _chunk[:num_bytes], _chunk[size:]
    return taken


def _mapped(num_bytes: int) -> Tensor:
    # The system aligns a mapping to its small pages: one huge page more leaves room to start at a huge one.
    mapping = mmap.mmap(
        -1, -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    return memory[start : start + num_bytes]


class _Cache:
    """Buffers of large results, used again and again.

    The system would zero fresh memory page by page in every step. Sizes are powers of two, so that few kinds exist; a
    buffer is free again when the last tensor in it is gone.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, num_bytes: int) -> np.ndarray:
        size = 1 << (num_bytes - 1).bit_length()
        free = self._free.setdefault(size, [])
        try:
            buffer = free.pop()
        except IndexError:
            buffer = _mapped(size).numpy()
        part = buffer[:num_bytes]
        weakref.finalize(part, free.append, buffer)
        return part


_SMALLEST_CACHED = 2**18
_cache = _Cache()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor for an op's result or scratch."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _SMALLEST_CACHED or Op.recorder is not None:  # a recorded step has its arena
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(_cache.take(num_bytes)).view(dtype).view(shape)
