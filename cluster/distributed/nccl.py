"""Collectives between CUDA devices: cupy's NCCL on torch's current stream.

Nothing here imports cupy before a communicator or a unique id is asked for.
"""

from __future__ import annotations

import atexit
import logging
import platform
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cluster.distributed.communicator import PeerLost
from cluster.distributed.nccl_cuda import CudaDevice
from cluster.distributed.nccl_in_flight import InFlight
from cluster.distributed.tensors import check_like, check_peer, check_rank
from cluster.errors import Unsupported

logger = logging.getLogger(__name__)

UNIQUE_ID_BYTES = 128
_POLL_S = 0.05
_LEAVE_S = 1.0  # how long a call into NCCL may take to end by itself before its communicator is aborted under it
_CLOSE_S = 3.0  # how long close waits for NCCL to let go; what it did not free by then ends with the process
_IN_PROGRESS = 7  # ncclInProgress, which cupy raises as the key that its table of errors lacks

_FLOATS = {torch.float32: "NCCL_FLOAT32", torch.float16: "NCCL_FLOAT16", torch.bfloat16: "NCCL_BFLOAT16"}
_INTEGERS = {torch.int64: "NCCL_INT64", torch.int32: "NCCL_INT32", torch.uint8: "NCCL_UINT8"}


def load_nccl() -> Any:
    """cupy's module ``cupy.cuda.nccl``.

    Raises:
        Unsupported: cupy or the NCCL library is missing.
    """
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise Unsupported(
            f"NCCL is reached through cupy, which does not load ({error}); "
            "pip install 'llm-cluster[cu13]', or [cu12] where torch is built for CUDA 12"
        ) from error
    if not nccl.available:  # cupy's own import succeeds without the library
        raise Unsupported("cupy finds no libnccl.so.2; pip install nvidia-nccl-cu13, or -cu12 for CUDA 12")
    return nccl


def new_unique_id(nccl: Any = None) -> bytes:
    """128 bytes that name a group to come, for rank 0 to make and to hand on. They hold the address that the process
    that made them listens on from now on, so it must live until all ranks have joined.

    Args:
        nccl: a module like ``cupy.cuda.nccl``; None loads that one.
    """
    return bytes((nccl or load_nccl()).get_unique_id())


class NcclCommunicator:
    """A ``Communicator`` between CUDA devices.

    Operations are queued on torch's current stream and may be captured into CUDA graphs. A thread of its own builds
    the communicator, then watches it, and aborts it when an operation fails or none finishes for ``timeout_s``. What
    hangs on the device then returns, with rubbish, and ``check`` raises. Eager operations are watched from the moment
    they are queued, replays of graphs from the next ``check`` on: call it after queueing a step, before waiting for its
    results, and again before using them. Once lost, it is lost for good; graphs that recorded it must not be replayed.

    Args:
        unique_id: from ``new_unique_id``.
        rank: in [0, size).
        size: ranks of the group.
        device: this rank's CUDA device, which is the calling thread's current one.
        timeout_s: how long operations in flight may take without one of them finishing.
        build_timeout_s: how long all ranks may take to join, and the first all-reduce after that; None: ``timeout_s``.
        batch_invariant: sums run in the order of the ranks, so results do not depend on what NCCL picks for a size.
        nccl: a module like ``cupy.cuda.nccl``; None loads that one.
        cuda: the device as the communicator uses it; None: the real one.

    Raises:
        Unsupported: there is no CUDA device, no cupy or no NCCL library here.
        PeerLost: not all ranks joined in time, or NCCL refused. A call into NCCL cannot be ended from outside while it
            joins, so a thread may stay in it until the process ends.
    """

    @staticmethod
    def available() -> bool:
        """Whether this machine has CUDA devices, cupy and the NCCL library."""
        if not torch.cuda.is_available():
            return False
        try:
            load_nccl()
        except Unsupported:
            return False
        return True

    def __init__(
        self,
        unique_id: bytes,
        rank: int,
        size: int,
        device: torch.device,
        *,
        timeout_s: float,
        build_timeout_s: float | None = None,
        batch_invariant: bool = False,
        nccl: Any = None,
        cuda: CudaDevice | None = None,
    ) -> None:
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise ValueError(f"a unique id has {UNIQUE_ID_BYTES} bytes, not {len(unique_id)}")
        check_rank(rank, size)
        self._cuda = cuda or CudaDevice(device)
        self._nccl = nccl or load_nccl()
        self.rank, self.size, self.device = rank, size, self._cuda.device
        self._batch_invariant = batch_invariant
        self._name = f"NCCL rank {rank} of {size} on {self.device} of {platform.node()}"
        self._codes = {dtype: getattr(self._nccl, name) for dtype, name in (_FLOATS | _INTEGERS).items()}
        self._errors = (self._nccl.NcclError, KeyError)  # the latter: a status that cupy has no name for

        self._communicator: Any = None
        self._in_flight = InFlight(self._cuda, time.monotonic)
        self._recorded = False  # graphs hold operations, which run without a call here
        self._queueing = threading.Lock()  # held while a call into NCCL queues something
        self._loss: tuple[str, tuple[int, ...]] | None = None  # (why, ranks that were waited for)
        self._loss_lock = threading.Lock()
        self._lost, self._joined = threading.Event(), threading.Event()
        self._keeper = threading.Thread(target=self._keep, args=(unique_id,), name=f"nccl-{rank}", daemon=True)
        try:
            self._build(timeout_s if build_timeout_s is None else build_timeout_s)
        except BaseException:
            self._lose("not built")
            raise
        self._awaited, self._patience_s = "any operation to finish; a rank is late or gone", timeout_s
        # Also keeps cupy's object from its destructor, which would wait for peers.
        atexit.register(self.close)

    def all_reduce_(self, x: Tensor) -> None:
        if x.dtype not in _FLOATS:
            raise ValueError(f"all_reduce_ takes float32, float16 or bfloat16, not {x.dtype}")
        self._check(x)
        if self._batch_invariant:
            self._all_reduce_in_order(x)
        else:
            self._all_reduce(x, self._nccl.NCCL_SUM)

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        check_like(out, x.dtype, (self.size, *x.shape))
        self._check(x, out)
        count, code = self._units(x)
        self._queue(lambda nccl, stream: nccl.allGather(x.data_ptr(), out.data_ptr(), count, code, stream))

    def all_to_all(self, x: Tensor, out: Tensor) -> None:
        check_like(x, x.dtype, (self.size, *x.shape[1:]))
        check_like(out, x.dtype, tuple(x.shape))
        self._check(x, out)
        count, code = self._units(x[0])
        stride = x[0].numel() * x.element_size()

        def queue(nccl: Any, stream: int) -> None:
            self._nccl.groupStart()  # none may wait for another: every rank sends before it receives
            try:
                for rank in range(self.size):
                    nccl.send(x.data_ptr() + rank * stride, count, code, rank, stream)
                    nccl.recv(out.data_ptr() + rank * stride, count, code, rank, stream)
            finally:
                self._nccl.groupEnd()

        self._queue(queue)

    def broadcast_(self, x: Tensor, root: int) -> None:
        self._check(x)
        check_rank(root, self.size)
        address, (count, code) = x.data_ptr(), self._units(x)
        self._queue(lambda nccl, stream: nccl.broadcast(address, address, count, code, root, stream))

    def send(self, x: Tensor, to_rank: int) -> None:
        self._check(x)
        check_peer(to_rank, self.rank, self.size)
        count, code = self._units(x)
        self._queue(lambda nccl, stream: nccl.send(x.data_ptr(), count, code, to_rank, stream))

    def recv(self, out: Tensor, from_rank: int) -> None:
        self._check(out)
        check_peer(from_rank, self.rank, self.size)
        count, code = self._units(out)
        self._queue(lambda nccl, stream: nccl.recv(out.data_ptr(), count, code, from_rank, stream))

    def barrier(self) -> None:
        """Also waits for the stream, unless it is capturing: the host is past it only when all ranks came."""
        self._all_reduce(self._num_ranks, self._nccl.NCCL_MAX)  # which leaves it as it is
        if not self._cuda.is_capturing():
            self._cuda.wait()
            self._raise_if_lost()

    def check(self) -> None:
        self._raise_if_lost()
        if self._recorded:
            self._in_flight.mark()

    def abort(self) -> None:
        """Returns at once; what hangs on the device returns soon after. Peers notice by their own deadline, or earlier
        where NCCL runs over a network."""
        self._lose("the communicator was aborted")

    def close(self) -> None:
        """Marks the communicator closed, aborts it, destroys it: NCCL's own way out without an abort waits for peers.
        What is still queued is cut off. Takes seconds where graphs that recorded it are alive: NCCL keeps its memory
        for them, so release them first."""
        self._lose("the communicator is closed")
        if threading.current_thread() is not self._keeper:
            self._keeper.join(_CLOSE_S)
            if self._keeper.is_alive():
                logger.warning("%s: not released within %g s; do CUDA graphs still hold it?", self._name, _CLOSE_S)
        atexit.unregister(self.close)

    def _build(self, timeout_s: float) -> None:
        """Joins the others, then counts them with a first all-reduce, which is where NCCL connects them."""
        self._awaited = "the other ranks to join (do they run, and reach rank 0? NCCL_SOCKET_IFNAME picks the network)"
        self._patience_s = timeout_s
        self._keeper.start()
        if not self._joined.wait(timeout_s):
            self._lose_patience()
        self._raise_if_lost()
        self._awaited = "the first all-reduce to finish"
        self._num_ranks = torch.ones(1, dtype=torch.int32, device=self.device)
        self._all_reduce(self._num_ranks, self._nccl.NCCL_SUM)
        self._cuda.wait()
        self._raise_if_lost()
        if (counted := int(self._num_ranks.item())) != self.size:
            self._lose(f"the first all-reduce counted {counted} ranks")
            self._raise_if_lost()

    def _all_reduce(self, x: Tensor, op: int) -> None:
        address, count, code = x.data_ptr(), x.numel(), self._codes[x.dtype]
        self._queue(lambda nccl, stream: nccl.allReduce(address, address, count, code, op, stream))

    def _all_reduce_in_order(self, x: Tensor) -> None:
        """Our own sum, in float32 from rank 0 on, each rank the same."""
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        self.all_gather(x, gathered)
        total = gathered[0].float()
        for rank in range(1, self.size):
            total += gathered[rank]
        x.copy_(total)

    def _units(self, x: Tensor) -> tuple[int, int]:
        """(count, dtype code) of a tensor that is moved, not added up: dtypes that NCCL does not know go as bytes."""
        code = self._codes.get(x.dtype)
        return (x.numel() * x.element_size(), self._codes[torch.uint8]) if code is None else (x.numel(), code)

    def _check(self, *tensors: Tensor) -> None:
        for x in tensors:
            if x.device != self.device or not x.is_contiguous():
                raise ValueError(
                    f"tensors must be contiguous, on {self.device}; got {tuple(x.shape)}, {x.stride()} on {x.device}"
                )

    def _queue(self, queue: Callable[[Any, int], None]) -> None:
        """Calls ``queue(cupy's communicator, stream)`` and has the watching thread wait for what it queues."""
        with self._queueing:
            self._raise_if_lost()
            try:
                with self._in_flight.queueing():
                    queue(self._communicator, self._cuda.stream())
            except self._errors as error:
                self._lose(f"an operation failed: {_describe(error)}")
                self._raise_if_lost(error)
            if self._cuda.is_capturing():
                self._recorded = True
            else:
                self._in_flight.mark()

    def _raise_if_lost(self, cause: Exception | None = None) -> None:
        if self._loss is not None:
            why, ranks = self._loss
            raise PeerLost(f"{self._name}: {why}", ranks) from cause

    def _lose(self, why: str, ranks: tuple[int, ...] = ()) -> None:
        """The first reason stays. From any thread."""
        with self._loss_lock:
            if self._loss is None:
                self._loss = (why, ranks)
        self._lost.set()

    def _lose_patience(self) -> None:
        # NCCL does not say for whom it waits.
        ranks = (1 - self.rank,) if self.size == 2 else ()
        self._lose(f"waited {self._patience_s:.3g} s for {self._awaited}", ranks)

    def _keep(self, unique_id: bytes) -> None:
        """The life of cupy's communicator: built, watched, aborted. In a thread of its own, since each may hang."""
        try:
            self._cuda.enter_thread()
            self._communicator = self._nccl.NcclCommunicator(self.size, unique_id, self.rank)
            self._joined.set()
            while not self._lost.wait(_POLL_S):
                self._watch()
        except Exception as error:
            self._lose(_describe(error))
        finally:
            self._joined.set()
            self._release()

    def _watch(self) -> None:
        """Loses the communicator where NCCL reports an error, or nothing has finished for too long."""
        try:
            self._communicator.check_async_error()
        except self._errors as error:
            if error.args != (_IN_PROGRESS,):
                self._lose(f"NCCL reports {_describe(error)}")
        if self._in_flight.waited_s() > self._patience_s:
            self._lose_patience()

    def _release(self) -> None:
        if self._communicator is None:
            return
        if self._queueing.acquire(timeout=_LEAVE_S):  # whoever takes longer waits for a peer, which abort ends
            self._queueing.release()
        self._communicator.abort()
        self._communicator.destroy()


def _describe(error: Exception) -> str:
    return f"status {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
