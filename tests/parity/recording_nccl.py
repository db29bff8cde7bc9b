"""Fakes of cupy's NCCL module and of a CUDA device. They show what is called, in which order and on which stream; not
that NCCL or CUDA would do what we think they do.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_TYPES = {0: torch.int8, 1: torch.uint8, 2: torch.int32, 4: torch.int64, 6: torch.float16, 7: torch.float32}
_TYPES[9] = torch.bfloat16


class FakeNcclError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"NCCL_ERROR_{status}")
        self.status = status


def view(address: int, count: int, code: int) -> Tensor:
    """The memory as a tensor."""
    dtype = _TYPES[code]
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)


@dataclass
class RecordingNccl:
    """Stands for the module ``cupy.cuda.nccl``, and for peers that hold the same tensors as the caller.

    Attributes:
        calls: (name, *arguments) of every call that queues, starts or ends something.
        others: what ``allGather`` finds at other ranks, where that is not the caller's own.
        join_error, join_gate: joining raises it; joining waits for it.
        async_error: what ``check_async_error`` raises.
        slow: calls that wait for an event, by name; they fail where the communicator was aborted by then.
        abort_gate: aborting waits for it.
        num_peers_counted: what an all-reduce multiplies by; None: the size of the group.
    """

    available = True
    NCCL_SUM, NCCL_MAX = 0, 2
    NCCL_UINT8, NCCL_INT32, NCCL_INT64, NCCL_FLOAT16, NCCL_FLOAT32, NCCL_BFLOAT16 = 1, 2, 4, 6, 7, 9
    NcclError = FakeNcclError

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    others: dict[int, Tensor] = field(default_factory=dict)
    join_error: Exception | None = None
    join_gate: threading.Event | None = None
    async_error: Exception | None = None
    slow: dict[str, threading.Event] = field(default_factory=dict)
    abort_gate: threading.Event | None = None
    num_peers_counted: int | None = None
    aborted: threading.Event = field(default_factory=threading.Event)

    def get_unique_id(self) -> bytes:
        return bytes(range(128))

    def groupStart(self) -> None:
        self.calls.append(("groupStart",))

    def groupEnd(self) -> None:
        self.calls.append(("groupEnd",))

    def NcclCommunicator(self, size: int, unique_id: bytes, rank: int) -> RecordingNcclCommunicator:
        self.calls.append(("join", size, unique_id, rank))
        if self.join_gate is not None:
            self.join_gate.wait()
        if self.join_error is not None:
            raise self.join_error
        return RecordingNcclCommunicator(self, size, rank)

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class RecordingNcclCommunicator:
    def __init__(self, module: RecordingNccl, size: int, rank: int) -> None:
        self._module, self._size, self._rank = module, size, rank

    def _record(self, name: str, *arguments: Any) -> None:
        self._module.calls.append((name, *arguments))
        if name in self._module.slow:
            self._module.slow[name].wait()
        if self._module.aborted.is_set():
            raise FakeNcclError(6)

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        self._record("allReduce", sendbuf, recvbuf, count, datatype, op, stream)
        out = view(recvbuf, count, datatype)
        out.copy_(view(sendbuf, count, datatype))
        if op == self._module.NCCL_SUM:
            out.mul_(self._size if self._module.num_peers_counted is None else self._module.num_peers_counted)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        self._record("allGather", sendbuf, recvbuf, count, datatype, stream)
        if not count:
            return
        own = view(sendbuf, count, datatype)
        for rank, out in enumerate(view(recvbuf, count * self._size, datatype).view(self._size, count)):
            out.copy_(self._module.others.get(rank, own))

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        self._record("broadcast", sendbuff, recvbuff, count, datatype, root, stream)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._record("send", sendbuf, count, datatype, peer, stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._record("recv", recvbuf, count, datatype, peer, stream)

    def check_async_error(self) -> None:
        if self._module.async_error is not None:
            raise self._module.async_error

    def abort(self) -> None:
        self._module.calls.append(("abort",))
        self._module.aborted.set()
        if self._module.abort_gate is not None:
            self._module.abort_gate.wait()

    def destroy(self) -> None:
        self._module.calls.append(("destroy",))


class FakeEvent:
    def __init__(self) -> None:
        self.reached = True

    def query(self) -> bool:
        return self.reached


@dataclass
class FakeCuda:
    """Stands for ``CudaDevice``: streams are numbers, and what is queued has finished unless ``stalled``.

    Attributes:
        stalled: marks recorded from now on are not reached.
        marks: (event, stream) of all that were recorded.
        thread: the thread that was made ready for CUDA.
        released_by: ``wait`` returns when it is set, where the stream has stalled.
    """

    released_by: threading.Event
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    current_stream: int = 7
    capturing: bool = False
    stalled: bool = False
    marks: list[tuple[FakeEvent, int]] = field(default_factory=list)
    thread: str = ""

    def enter_thread(self) -> None:
        self.thread = threading.current_thread().name

    def stream(self) -> int:
        return self.current_stream

    def is_capturing(self) -> bool:
        return self.capturing

    def record(self, event: FakeEvent | None) -> FakeEvent:
        assert not self.capturing, "an event recorded in a capture is not a mark but a node of the graph"
        mark = FakeEvent() if event is None else event
        mark.reached = not self.stalled
        self.marks.append((mark, self.current_stream))
        return mark

    def wait(self) -> None:
        if self.stalled:
            self.released_by.wait()
