"""What a group needs of whoever starts its shards: subprocesses here, actors in a Ray cluster."""

from __future__ import annotations

from typing import Protocol


class Launcher(Protocol):
    """Starts the processes of one group's ranks, and ends them.

    Every process calls ``shard_worker.run_shard`` with the arguments of ``launch``; all else goes over the socket.

    Attributes:
        host: address of this node at which the shards reach it; None: all of them run on this node.
    """

    host: str | None

    def launch(self, rank: int, address: str, secret: str) -> None:
        """Begins to start a rank, and does not wait for it.

        Args:
            rank: in [0, world_size).
            address: where the group's leader listens.
            secret: of the group; it must not show in a log, nor in a process's arguments.

        Raises:
            ClusterError: it cannot be started; the message says what to change.
        """

    def ended(self, rank: int) -> str | None:
        """How the rank's process ended, as words that follow "rank 1", e.g. "was killed by SIGKILL"; None while it
        lives or where that is not known. From any thread."""

    def stop(self) -> None:
        """Ends every process that is left, at once, and returns when they are gone. From any thread; idempotent."""
