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
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore, Work

from cluster.distributed.communicator import PeerLost
from cluster.distributed.gloo_watch import Watch
from cluster.distributed.tensors import check_contiguous, check_like, check_peer, check_rank, rank_names

_TAG = 0
_INSTANT = timedelta(milliseconds=1)
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
    of the ranks. The group ends at once when a connection breaks, and after ``timeout_s`` when a rank does not come; to
    find out which one it was takes up to two seconds more.
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
        self._lock = threading.Lock()  # of the group's use by other threads, and of its end
        self._group: ProcessGroupGloo | None = None
        timeout = timedelta(seconds=timeout_s)
        deadline = time.monotonic() + timeout_s
        try:
            table = TCPStore(store_host, store_port, timeout=timeout, wait_for_workers=False)
            store = PrefixStore(prefix, table)
            self._meet(store, deadline)
            options = ProcessGroupGloo._Options()
            options._devices = [ProcessGroupGloo.create_device(hostname=_address_towards(store_host, store_port))]
            options._timeout = timeout
            options._threads = 1
            self._group = ProcessGroupGloo(store, rank, size, options)
        except RuntimeError as error:
            raise PeerLost(f"rank {rank} of {size} could not join by {store_host}:{store_port}: {error}") from error
        self._watch = Watch(store, rank, size, self._break_connections)

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
        if self._watch.verdict is not None:
            raise PeerLost(self._watch.verdict.message, self._watch.verdict.ranks)
        if self._group is None:
            raise PeerLost("the communicator is closed")

    def abort(self) -> None:
        if self._group is None:
            return
        self._watch.report(f"rank {self.rank} of {self.size} has aborted the group", is_abort=True)
        self._break_connections()
        self._watch.wait()

    def close(self) -> None:
        self._watch.close()
        with self._lock:
            self._group = None

    def _meet(self, store: Store, deadline: float) -> None:
        """Waits for all ranks; gloo itself would not say who is missing."""
        store.set(f"joined/{self.rank}", "1")
        while missing := tuple(rank for rank in range(self.size) if not store.check([f"joined/{rank}"])):
            if time.monotonic() >= deadline:
                late = f"{rank_names(missing)} did not join within {self._timeout_s:g} s"
                raise PeerLost(f"{late}, says rank {self.rank} of {self.size}", missing)
            time.sleep(0.01)

    def _run(self, start: Callable[[ProcessGroupGloo], Work], peer: int | None = None) -> None:
        """One operation, with ``peer`` alone or with all."""
        self.check()
        group = self._group
        assert group is not None
        if peer is None:
            self._watch.num_begun += 1
        try:
            start(group).wait()
        except RuntimeError as error:
            self._watch.report(f"rank {self.rank} of {self.size}: {error}", peer)
            self._break_connections()
            self._watch.wait()
        self.check()

    def _break_connections(self) -> None:
        """gloo has no abort, but when a wait runs out it closes the connections, and whatever uses them fails."""
        with self._lock:
            group = self._group
            if group is None:
                return
            for peer in range(self.size):
                if peer != self.rank:
                    with contextlib.suppress(RuntimeError):
                        group.recv([torch.zeros(1, dtype=torch.uint8)], peer, _UNUSED_TAG).wait(_INSTANT)


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
