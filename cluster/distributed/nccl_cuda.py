"""What an NCCL communicator needs of CUDA: torch's current stream, marks on it, and threads that spoil no capture."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch

from cluster.errors import Unsupported

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


class Event(Protocol):
    """A mark on a stream."""

    def query(self) -> bool:
        """Whether the stream has reached it. Never waits."""


class CudaDevice:
    """One CUDA device.

    Attributes:
        device: with its index.

    Raises:
        Unsupported: it is no CUDA device, or this machine has none.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise Unsupported(f"NCCL connects CUDA devices, and {device} is none that this machine has")
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

    def enter_thread(self) -> None:
        """Makes the device the calling thread's, and its calls harmless to graphs that other threads capture.

        A capture forbids "unsafe" calls to all threads, and asking whether an event was reached is one of them: a
        watching thread would break the capture. With this mode the ban holds for the capturing thread alone.
        """
        torch.cuda.set_device(self.device)
        mode = ctypes.c_int(_THREAD_LOCAL)
        status = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        if status != 0:
            raise Unsupported(f"the CUDA driver refuses a capture mode per thread (error {status}); it is too old")

    def stream(self) -> int:
        """The address of the calling thread's current stream."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def is_capturing(self) -> bool:
        """Whether what is queued on the current stream is recorded into a graph instead of run."""
        return torch.cuda.is_current_stream_capturing()

    def record(self, event: Any | None) -> Event:
        """Marks the current stream's end, with an event made here that is of no more use or, where None, a new one."""
        mark = torch.cuda.Event() if event is None else event
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def wait(self) -> None:
        """Returns when the current stream has done all that is queued on it."""
        torch.cuda.current_stream(self.device).synchronize()
