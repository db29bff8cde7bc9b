"""What shards need of whatever connects them. ``shm``, ``gloo`` and ``nccl`` each give one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cluster.errors import EngineFault

if TYPE_CHECKING:  # a shard's process tells why it ends also before it has loaded torch
    from torch import Tensor


class PeerLost(EngineFault):
    """A rank did not come to a collective in time, or the communicator was aborted; it is of no use from then on.

    Attributes:
        ranks: those that were waited for, as far as known, as ranks of the communicator.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class Communicator(Protocol):
    """Collectives between the ranks of one group.

    Every rank calls the same operations in the same order with the same shapes and dtypes. Tensors are contiguous and
    live on the communicator's device. Sums run in the order of the ranks on ``shm`` and ``gloo`` (and on ``nccl`` in
    batch-invariant mode), so the same inputs give the same bits. On CPU a call returns when it is done; on CUDA it is
    queued on torch's current stream. One thread calls everything but ``abort``.

    Attributes:
        rank: in [0, size).
        size: ranks of the group.
    """

    rank: int
    size: int

    def all_reduce_(self, x: Tensor) -> None:
        """Replaces ``x`` (floats) by the sum over all ranks.

        Raises:
            PeerLost: a rank was not there by the deadline, or the communicator was aborted; as all operations here.
        """

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        """Fills ``out`` (size, *x.shape) with every rank's ``x`` (any dtype)."""

    def all_to_all(self, x: Tensor, out: Tensor) -> None:
        """Sends ``x[r]`` to rank r for each r; ``out[r]`` is what rank r sent here. Both (size, ...)."""

    def broadcast_(self, x: Tensor, root: int) -> None:
        """Replaces ``x`` by rank ``root``'s."""

    def send(self, x: Tensor, to_rank: int) -> None:
        """``x`` is free again on return. May wait for the receiver."""

    def recv(self, out: Tensor, from_rank: int) -> None:
        """The next tensor that ``from_rank`` sent here; same shape and dtype."""

    def barrier(self) -> None: ...

    def check(self) -> None:
        """Raises PeerLost where an operation that was queued or recorded has failed. Cheap: called after every step."""

    def abort(self) -> None:
        """Lets every operation under way or to come raise PeerLost, here and, as far as can be, on the peers. From any
        thread. Idempotent."""

    def close(self) -> None:
        """Releases what the communicator holds, without waiting for peers. Idempotent."""
