"""What a rank is connected to the others of its group by: its communicators and its end of the token feed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch

from cluster.distributed.communicator import Communicator
from cluster.distributed.frames import Listener
from cluster.errors import ConfigError
from cluster.worker.messages import Join
from cluster.worker.token_sockets import SocketTokenSink, SocketTokenSource

Kind = Literal["nccl", "shm", "gloo"]


class Rendezvous(Protocol):
    """How ranks that are not connected yet tell each other where to meet."""

    def offer(self, key: str, value: bytes) -> None:
        """Tells all other ranks."""

    def await_offer(self, key: str) -> bytes:
        """What another rank offered, or will."""


class Connections:
    """Built in the same order on every rank; then each is used by one thread. Owns all of them.

    Attributes:
        tp: between the ranks of the stage; None: it has one.
        pp: between the ranks with the same place in every stage; None: there is one stage.
        tokens: the feed's source on the first stage's ranks, its sink on the rank that answers; None elsewhere.
    """

    def __init__(self, join: Join, secret: str, rendezvous: Rendezvous, local_host: str | None) -> None:
        """Returns when all ranks that this one is connected to have come.

        Args:
            local_host: this node's address for ranks on others; None: all are on this node.

        Raises:
            PeerLost: ranks did not come in time.
            ConfigError: the configured communicator does not reach all ranks.
            Unsupported: it is not installed.
        """
        self._join = join
        self._secret = secret
        self._rendezvous = rendezvous
        self._local_host = local_host
        self._kept: list[object] = []  # a table that gloo's ranks meet by
        # Whoever is slow between two operations while the group starts, is not lost; and while it serves, the leader's
        # deadline for a step ends the group, and what it aborts ends at once.
        self._timeout_s = max(join.start_timeout_s, join.step_timeout_s)
        layout = join.layout
        self.tp: Communicator | None = None
        self.pp: Communicator | None = None
        self.tokens: SocketTokenSource | SocketTokenSink | None = None
        try:
            if layout.tp_size > 1:
                self.tp = self._connect(f"tp{layout.pp_rank}", layout.tp_ranks)
            if layout.pp_size > 1:
                self.pp = self._connect(f"pp{layout.tp_rank}", layout.pp_ranks)
                self.tokens = self._connect_tokens()
        except BaseException:
            self.close()
            raise

    def abort(self) -> None:
        """Lets every operation under way raise PeerLost. From any thread."""
        for connection in (self.tokens, self.tp, self.pp):
            if connection is not None:
                connection.abort()

    def close(self) -> None:
        for connection in (self.tokens, self.tp, self.pp):
            if connection is not None:
                connection.close()

    def _connect(self, name: str, ranks: Sequence[int]) -> Communicator:
        rank, size = ranks.index(self._join.layout.rank), len(ranks)
        kind = self._kind([self._join.machines[peer] for peer in ranks])
        # Each is imported where it is needed: nccl loads cupy.
        if kind == "nccl":
            from cluster.distributed.nccl import NcclCommunicator, new_unique_id

            unique_id = self._agree(name, rank, new_unique_id)
            return NcclCommunicator(
                unique_id,
                rank,
                size,
                torch.device("cuda", torch.cuda.current_device()),
                timeout_s=self._timeout_s,
                batch_invariant=self._join.worker.batch_invariant,
            )
        if kind == "shm":
            from cluster.distributed.shm import ShmCommunicator, segment_path

            path = self._agree(name, rank, lambda: segment_path().encode())
            return ShmCommunicator(path.decode(), rank, size, timeout_s=self._timeout_s)
        from cluster.distributed.gloo import GlooCommunicator

        host, _, port = self._agree(name, rank, self._host_store).decode().rpartition(" ")
        return GlooCommunicator(host, int(port), name, rank, size, timeout_s=self._timeout_s)

    def _agree(self, name: str, rank: int, make: Callable[[], bytes]) -> bytes:
        """What the first of the ranks makes, on all of them."""
        if rank > 0:
            return self._rendezvous.await_offer(name)
        made = make()
        self._rendezvous.offer(name, made)
        return made

    def _host_store(self) -> bytes:
        from cluster.distributed.gloo import host_store

        host = self._local_host or "127.0.0.1"
        store = host_store(host)
        self._kept.append(store)
        return f"{host} {store.port}".encode()

    def _connect_tokens(self) -> SocketTokenSource | SocketTokenSink | None:
        layout = self._join.layout
        if layout.is_first_stage:
            return SocketTokenSource(self._rendezvous.await_offer("tokens").decode(), self._secret, self._timeout_s)
        if not (layout.is_last_stage and layout.tp_rank == 0):
            return None
        listener = Listener(self._secret, self._local_host)
        try:
            self._rendezvous.offer("tokens", listener.address.encode())
            return SocketTokenSink(listener, layout.tp_size, self._timeout_s)
        finally:
            listener.close()

    def _kind(self, machines: Sequence[str]) -> Kind:
        chosen = self._join.communicator
        is_one_machine = len(set(machines)) == 1
        on_cuda = self._join.worker.device != "cpu" and torch.cuda.is_available()
        if chosen == "auto":
            if on_cuda:
                return "nccl"
            return "shm" if is_one_machine and _has_shm() else "gloo"
        if (chosen == "nccl") is not on_cuda:
            device = "CUDA" if on_cuda else "CPU"
            raise ConfigError(
                f"parallel.communicator is {chosen}, which does not connect shards on {device}; use auto",
                field="parallel.communicator",
            )
        if chosen == "shm" and not (is_one_machine and _has_shm()):
            raise ConfigError(
                "parallel.communicator is shm, and the shards have no memory in common that our C kernels could use: "
                "use auto",
                field="parallel.communicator",
            )
        return chosen


def _has_shm() -> bool:
    from cluster.distributed.shm import ShmCommunicator

    return ShmCommunicator.available()
