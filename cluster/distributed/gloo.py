"""Collectives between ranks on CPUs of any hosts, over TCP: torch's gloo, without its global process group."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore, Work

from cluster.distributed.communicator import PeerLost
from cluster.distributed.tensors import check_contiguous, check_like, check_peer, check_rank, rank_names

_GRACE_S = 1.0  # after a failure, for the other ranks to say that they live
_TAG = 0
_UNUSED_TAG = 1  # nothing is ever sent with it
_PARTS_BYTES = 64 << 10  # from here on each rank sums a part
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def host_store(host: str) -> TCPStore:
    """The table through which ranks find each other; lives as long as the object, serves any number of groups.

    It knows no password: bind it to an address that only the group's hosts can reach.

    Args:
        host: the address to listen on, which the ranks must be able to reach; the port is the object's ``port``.
    """
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen()
        return TCPStore(
            host,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


class GlooCommunicator:
    """A Communicator over TCP.

    ``all_reduce_`` takes floats (halves are summed in float32, rounded once), all else any dtype. Sums run in the order
    of the ranks. A connection that breaks ends the group at once, a rank that is silent after ``timeout_s``.
    """

    def __init__(
        self, store_host: str, store_port: int, prefix: str, rank: int, size: int, *, timeout_s: float
    ) -> None:
        """Joins the group; returns when all ranks have.

        Args:
            store_host, store_port: of the table that ``host_store`` made.
            prefix: the group's name in that table, the same for all ranks and used by no group before.
            timeout_s: of joining, and of every operation's parts afterwards.

        Raises:
            PeerLost: ranks did not come in time, or nothing answers at the table's address.
        """
        self.rank = rank
        self.size = size
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # of failing, aborting and closing
        self._failure: PeerLost | None = None
        self._is_aborted = False
        self._group: ProcessGroupGloo | None = None
        timeout = timedelta(seconds=timeout_s)
        deadline = time.monotonic() + timeout_s
        try:
            table = TCPStore(store_host, store_port, timeout=timeout, wait_for_workers=False)
            self._store = PrefixStore(prefix, table)
            self._meet(deadline)
            options = ProcessGroupGloo._Options()
            options._devices = [ProcessGroupGloo.create_device(hostname=_address_towards(store_host, store_port))]
            options._timeout = timeout
            options._threads = 1
            self._group = ProcessGroupGloo(self._store, rank, size, options)
        except RuntimeError as error:
            raise PeerLost(f"rank {rank} of {size} could not join by {store_host}:{store_port}: {error}") from error

    def all_reduce_(self, x: Tensor) -> None:
        if x.dtype not in _FLOATS:
            raise ValueError(f"sums are of {', '.join(map(str, _FLOATS))}; got {x.dtype}")
        if self.size == 2 and x.itemsize >= 4:  # two terms have one order
            self._run(lambda group: group.allreduce([x]))
            return
        flat = x.view(-1)
        if self.size > 2 and x.nbytes >= _PARTS_BYTES:
            self._reduce_parts(flat)
            return
        terms = torch.empty(self.size, flat.numel(), dtype=x.dtype)
        self.all_gather(flat, terms)
        flat.copy_(_sum(terms))

    def _reduce_parts(self, flat: Tensor) -> None:
        """Each rank sums its part, then they are put together."""
        part = -(-flat.numel() // self.size)
        padded = torch.zeros(self.size, part, dtype=flat.dtype)
        padded.view(-1)[: flat.numel()] = flat
        terms = torch.empty_like(padded)
        self.all_to_all(padded, terms)
        self.all_gather(_sum(terms), padded)
        flat.copy_(padded.view(-1)[: flat.numel()])

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        check_like(out, x.dtype, (self.size, *x.shape))
        self._run(lambda group: group._allgather_base(_bytes(out), _bytes(x)))

    def all_to_all(self, x: Tensor, out: Tensor) -> None:
        check_like(x, x.dtype, (self.size, *x.shape[1:]))
        check_like(out, x.dtype, tuple(x.shape))
        self._run(lambda group: group.alltoall_base(_bytes(out), _bytes(x), [], []))

    def broadcast_(self, x: Tensor, root: int) -> None:
        check_rank(root, self.size)
        self._run(lambda group: group.broadcast(_bytes(x), root))

    def send(self, x: Tensor, to_rank: int) -> None:
        check_peer(to_rank, self.rank, self.size)
        self._run(lambda group: group.send([_bytes(x)], to_rank, _TAG), peer=to_rank)

    def recv(self, out: Tensor, from_rank: int) -> None:
        check_peer(from_rank, self.rank, self.size)
        self._run(lambda group: group.recv([_bytes(out)], from_rank, _TAG), peer=from_rank)

    def barrier(self) -> None:
        self._run(lambda group: group.barrier())

    def check(self) -> None:
        if self._failure is not None:
            raise PeerLost(self._failure.message, self._failure.ranks)
        if self._is_aborted:
            raise PeerLost(f"rank {self.rank} of {self.size} has aborted the group")
        if self._group is None:
            raise PeerLost("the communicator is closed")

    def abort(self) -> None:
        with self._lock:
            if self._group is None or self._is_aborted:
                return
            self._is_aborted = True
            self._break_connections()

    def close(self) -> None:
        with self._lock:
            self._group = None

    def _meet(self, deadline: float) -> None:
        """Waits for all ranks; gloo itself would not say who is missing."""
        self._store.set(f"joined/{self.rank}", "1")
        while missing := self._silent("joined"):
            if time.monotonic() >= deadline:
                late = f"{rank_names(missing)} did not join within {self._timeout_s:g} s"
                raise PeerLost(f"{late}, says rank {self.rank} of {self.size}", missing)
            time.sleep(0.01)

    def _silent(self, word: str) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.size) if not self._store.check([f"{word}/{rank}"]))

    def _run(self, start: Callable[[ProcessGroupGloo], Work], peer: int | None = None) -> None:
        self.check()
        group = self._group
        assert group is not None
        try:
            start(group).wait()
        except RuntimeError as error:
            self._fail(error, peer)
        self.check()

    def _fail(self, error: RuntimeError, peer: int | None) -> None:
        with self._lock:
            if self._is_aborted:
                return
            self._break_connections()  # so that the others need not wait for their own deadline
        silent = self._lost(peer)
        who = f"{rank_names(silent)} is lost" if silent else "a connection was lost"
        self._failure = PeerLost(f"{who}, says rank {self.rank} of {self.size}: {error}", silent)

    def _break_connections(self) -> None:
        """gloo has no abort, but when a wait runs out it closes the connections, and whatever uses them fails."""
        assert self._group is not None
        for peer in range(self.size):
            if peer != self.rank:
                with contextlib.suppress(RuntimeError):
                    nothing = torch.zeros(1, dtype=torch.uint8)
                    self._group.recv([nothing], peer, _UNUSED_TAG).wait(timedelta(milliseconds=1))

    def _lost(self, peer: int | None) -> tuple[int, ...]:
        """Ranks that do not say that they live, now that all have seen something fail.

        A table that does not answer leaves the peer of the operation, if it had one.
        """
        silent: tuple[int, ...] = () if peer is None else (peer,)

        def ask() -> None:
            nonlocal silent
            with contextlib.suppress(RuntimeError):
                self._store.set(f"alive/{self.rank}", "1")
                deadline = time.monotonic() + _GRACE_S
                while (asked := self._silent("alive")) and time.monotonic() < deadline:
                    time.sleep(0.02)
                silent = asked

        asking = threading.Thread(target=ask, daemon=True)  # its host may be stopped: a call may never return
        asking.start()
        asking.join(2 * _GRACE_S)
        return silent


def _sum(terms: Tensor) -> Tensor:
    """Of the rows, in their order; halves in float32, rounded once."""
    wide = terms.float() if terms.itemsize < 4 else terms
    total = wide[0].clone()
    for term in wide[1:]:
        total += term
    return total.to(terms.dtype)


def _bytes(x: Tensor) -> Tensor:
    check_contiguous(x)
    return x.view(-1).view(torch.uint8)


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the way to ``host``: the one at which the group's hosts reach it."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # of a datagram socket: sends nothing
        return str(probe.getsockname()[0])
