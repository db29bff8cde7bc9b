"""All shards of a group as threads of this process, each with real communicators in shared memory; an executor for
tests that look into a rank, or put a fault into what connects them."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from cluster.core.step import StepInput, StepOutput
from cluster.distributed.communicator import Communicator
from cluster.distributed.layout import Layout
from cluster.distributed.shm import ShmCommunicator, segment_path
from cluster.worker.config import WorkerConfig
from cluster.worker.shard import Shard

T = TypeVar("T")

TIMEOUT_S = 60.0


class QueueFeed:
    """One rank's end of the way of tokens, and the sink's: whoever holds all of them puts to each."""

    def __init__(self) -> None:
        self._arrived: queue.Queue[tuple[int, list[int]]] = queue.Queue()

    def get(self, step_id: int) -> Sequence[int]:
        came, token_ids = self._arrived.get(timeout=TIMEOUT_S)
        assert came == step_id, f"tokens of step {came} came, those of {step_id} were asked for"
        return token_ids

    def deliver(self, step_id: int, token_ids: Sequence[int]) -> None:
        self._arrived.put((step_id, list(token_ids)))


class QueueSink:
    def __init__(self, sources: Sequence[QueueFeed]) -> None:
        self.sources = sources

    def put(self, step_id: int, token_ids: Sequence[int]) -> None:
        for source in self.sources:
            source.deliver(step_id, token_ids)


class ThreadShards:
    """Implements ``engine.Executor``.

    Args:
        stages: first and last + 1 of each stage's layers.
        wrap_tp: puts a fault into a rank's communicator.
        wrap_sink: puts a fault into the way of tokens.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: WorkerConfig,
        *,
        tp_size: int,
        stages: Sequence[tuple[int, int] | None] = (None,),
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 48,
        wrap_tp: Callable[[Communicator], Communicator] = lambda tp: tp,
        wrap_sink: Callable[[QueueSink], Any] = lambda sink: sink,
    ) -> None:
        pp_size = len(stages)
        self._layouts = [
            Layout(rank=rank, tp_size=tp_size, pp_size=pp_size, layers=stages[rank // tp_size])
            for rank in range(tp_size * pp_size)
        ]
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"rank-{layout.rank}") for layout in self._layouts]
        self._comms: list[ShmCommunicator] = []
        self._lock = threading.Lock()
        feeds = [QueueFeed() for _ in range(tp_size)]
        tp_paths = [segment_path() for _ in range(pp_size)]
        pp_paths = [segment_path() for _ in range(tp_size)]

        def create(layout: Layout) -> Shard:
            tp = pp = tokens = None
            if tp_size > 1:
                tp = wrap_tp(self._join(tp_paths[layout.pp_rank], layout.tp_rank, tp_size))
            if pp_size > 1:
                pp = self._join(pp_paths[layout.tp_rank], layout.pp_rank, pp_size)
                if layout.is_first_stage:
                    tokens = feeds[layout.tp_rank]
                elif layout.is_last_stage and layout.tp_rank == 0:
                    tokens = wrap_sink(QueueSink(feeds))
            return Shard(
                checkpoint,
                config,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                layout=layout,
                tp=tp,
                pp=pp,
                tokens=tokens,
            )

        self.shards = self._on_all(create)
        self._by_rank = dict(zip((layout.rank for layout in self._layouts), self.shards, strict=True))
        num_blocks = min(self.each(lambda shard: shard.load()))
        self.model = self.each(lambda shard: shard.allocate(num_blocks))[-tp_size]
        self._answering = (pp_size - 1) * tp_size
        self.max_in_flight = pp_size + 1 if pp_size > 1 else 1
        self._in_flight: deque[list[Future[StepOutput]]] = deque()

    def _join(self, path: str, rank: int, size: int) -> ShmCommunicator:
        communicator = ShmCommunicator(path, rank, size, timeout_s=TIMEOUT_S)
        with self._lock:
            self._comms.append(communicator)
        return communicator

    def _on_all(self, work: Callable[[Layout], T]) -> list[T]:
        futures = [pool.submit(work, layout) for pool, layout in zip(self._pools, self._layouts, strict=True)]
        return [future.result() for future in futures]

    def each(self, work: Callable[[Shard], T]) -> list[T]:
        """What ``work`` gives on each rank, all at the same time."""
        return self._on_all(lambda layout: work(self._by_rank[layout.rank]))

    def submit(self, step: StepInput) -> None:
        def run(shard: Shard) -> StepOutput:
            return shard.runner.launch(step)()

        self._in_flight.append([pool.submit(run, shard) for pool, shard in zip(self._pools, self.shards, strict=True)])

    def collect(self) -> StepOutput:
        outputs = [future.result(TIMEOUT_S) for future in self._in_flight.popleft()]
        silent = [output for rank, output in enumerate(outputs) if rank != self._answering]
        assert not any(output.sampled or output.failed for output in silent), "a rank answers that should not"
        return outputs[self._answering]

    def shutdown(self) -> None:
        for communicator in self._comms:
            communicator.abort()
        for pool in self._pools:
            pool.shutdown()
        for shard in self.shards:
            shard.shutdown()
        for communicator in self._comms:
            communicator.close()
