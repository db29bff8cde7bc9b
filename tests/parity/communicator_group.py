"""Groups of ranks in processes of their own, for the tests of communicators.

A task is a function of a module that the ranks can import; it runs on every rank with that rank's communicator first.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from torch.distributed import TCPStore

from cluster.distributed.communicator import Communicator, PeerLost
from cluster.distributed.gloo import GlooCommunicator, host_store
from cluster.distributed.shm import ShmCommunicator, segment_path

# A server that has imported what ranks need forks them: a rank is there in milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "numpy.random", "cluster.distributed.gloo", "cluster.distributed.shm"])

_PATIENCE_S = 60.0


class Meeting(Protocol):
    """How the ranks of one group find each other; ``join`` runs in the ranks' processes."""

    def join(self, rank: int, size: int, timeout_s: float) -> Communicator: ...


class ShmMeeting:
    device = "cpu"

    def __init__(self) -> None:
        self.path = segment_path()

    def join(self, rank: int, size: int, timeout_s: float) -> ShmCommunicator:
        return ShmCommunicator(self.path, rank, size, timeout_s=timeout_s)


class GlooMeeting:
    device = "cpu"
    store: TCPStore | None = None

    def __init__(self) -> None:
        GlooMeeting.store = GlooMeeting.store or host_store("127.0.0.1")
        self.port = GlooMeeting.store.port
        self.prefix = os.urandom(8).hex()

    def join(self, rank: int, size: int, timeout_s: float) -> GlooCommunicator:
        return GlooCommunicator("127.0.0.1", self.port, self.prefix, rank, size, timeout_s=timeout_s)


@dataclass(frozen=True)
class Raised:
    """What a task raised.

    Attributes:
        took_s: how long it had run.
        trace: where it was.
    """

    error: BaseException
    took_s: float
    trace: str


class Group:
    """Ranks that wait for tasks.

    Args:
        delays_s: how long each rank sleeps before it joins; a rank with None is not started.
        wait: for the ranks to join or fail; else what became of that is their first result.

    Attributes:
        joined: None or Raised, by rank.
    """

    def __init__(
        self,
        meeting: Meeting,
        size: int,
        *,
        timeout_s: float = 20.0,
        delays_s: Sequence[float | None] | None = None,
        wait: bool = True,
    ) -> None:
        self.size = size
        self._pipes: dict[int, Connection] = {}
        self._processes = {}
        for rank, delay_s in enumerate(delays_s or [0.0] * size):
            if delay_s is None:
                continue
            self._pipes[rank], theirs = _context.Pipe()
            arguments = (theirs, meeting, rank, size, timeout_s, delay_s)
            self._processes[rank] = _context.Process(target=_serve, args=arguments, daemon=True)
            self._processes[rank].start()
            theirs.close()
        self.joined = self.results() if wait else {}

    def start(self, task: Callable[..., Any], *arguments: Any, ranks: Sequence[int] | None = None) -> None:
        for rank in self._pipes if ranks is None else ranks:
            self._pipes[rank].send((task, arguments))

    def results(self, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """What the ranks' tasks gave, or Raised, by rank."""
        results = {}
        for rank in self._pipes if ranks is None else ranks:
            assert self._pipes[rank].poll(_PATIENCE_S), f"rank {rank} does not answer"
            results[rank] = self._pipes[rank].recv()
        return results

    def run(self, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of all ranks, none of which may raise."""
        self.start(task, *arguments)
        results = self.results()
        for rank, result in results.items():
            assert not isinstance(result, Raised), f"rank {rank}: {result.trace}"
        return list(results.values())

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self._processes[rank].pid, number)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
        for rank, process in self._processes.items():
            process.join()
            self._pipes[rank].close()


def _serve(pipe: Connection, meeting: Meeting, rank: int, size: int, timeout_s: float, delay_s: float) -> None:
    torch.set_num_threads(1)
    time.sleep(delay_s)
    communicator = None

    def join() -> None:
        nonlocal communicator
        communicator = meeting.join(rank, size, timeout_s)

    pipe.send(_outcome(join))
    while True:
        try:
            task, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcome(lambda task=task, arguments=arguments: task(communicator, *arguments)))


def _outcome(call: Callable[[], Any]) -> Any:
    start = time.monotonic()
    try:
        return call()
    except BaseException as error:
        return Raised(error, time.monotonic() - start, traceback.format_exc())


def lost_ranks(result: Any) -> tuple[int, ...]:
    """The ranks that a rank's PeerLost names."""
    assert isinstance(result, Raised), f"expected PeerLost, got {result!r}"
    assert isinstance(result.error, PeerLost), result.trace
    return result.error.ranks
