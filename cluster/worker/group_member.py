"""One rank as the leader sees it."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.distributed.frames import FrameSocket
from cluster.errors import EngineFault
from cluster.worker.messages import Hello


class GroupLost(EngineFault):
    """A rank is gone, hangs or failed, and its group has ended with it.

    Attributes:
        ranks: whose fault it is, as far as known.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = (), *, field: str = "") -> None:
        super().__init__(message, field=field)
        self.ranks = ranks


@dataclass(kw_only=True)
class Member:
    """A rank that has connected.

    Attributes:
        work, control: its connections; see ``messages``.
        done_step: the last step that it has finished.
        ping: the number of the last one that was sent to it.
        silent_since: when that was; None: it is answered.
    """

    hello: Hello
    work: FrameSocket
    control: FrameSocket
    done_step: int = -1
    ping: int = 0
    silent_since: float | None = None

    @property
    def rank(self) -> int:
        return self.hello.rank

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.hello.pid} on {self.hello.host})"

    def close(self) -> None:
        self.work.close()
        self.control.close()
