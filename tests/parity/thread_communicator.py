"""Ranks as threads of one process: a Communicator for tests, over a barrier and plain memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_TIMEOUT_S = 120.0


class ThreadGroup:
    """``size`` ranks that meet at a barrier; a rank that fails breaks it for all. They take turns between meetings:
    Triton's interpreter, for one, takes one caller at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=_TIMEOUT_S)
        self.turn = threading.Lock()
        self.given: list[Tensor] = [torch.empty(0)] * size

    def run(self, work: Callable[[ThreadCommunicator], T]) -> list[T]:
        """What ``work`` gives on each rank; the first failure that is not just a broken barrier."""

        def guarded(rank: int) -> T:
            try:
                with self.turn, torch.inference_mode():
                    return work(ThreadCommunicator(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.size)]
        errors = [future.exception() for future in futures]
        for error in sorted(filter(None, errors), key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]


class ThreadCommunicator:
    """One rank of a ThreadGroup; of the protocol, what layers call."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.rank, self.size = rank, group.size
        self._group = group

    def all_reduce_(self, x: Tensor) -> None:
        """Sums in the order of the ranks."""
        self._group.given[self.rank] = x.clone()
        self._meet()
        total = torch.stack(self._group.given).float().cumsum(0)[-1]
        self._meet()
        x.copy_(total)

    def _meet(self) -> None:
        self._group.turn.release()
        try:
            self._group.barrier.wait()
        finally:
            self._group.turn.acquire()
