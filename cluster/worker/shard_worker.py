"""The process of one rank: connects to the group's leader and does what it says, until one of them ends."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from cluster.core.layer_split import StageTimes
from cluster.core.model_info import ModelInfo
from cluster.core.step import StepInput, StepOutput
from cluster.distributed.frames import ConnectionLost, FrameSocket, connect
from cluster.errors import ClusterError, EngineFault
from cluster.worker.messages import (
    Allocate,
    Allocated,
    Done,
    Failed,
    Hello,
    Join,
    Joined,
    Load,
    Loaded,
    Offer,
    Ping,
    Pong,
    Ran,
    Run,
    ToShard,
    decode_to_shard,
    encode,
)
from cluster.worker.stage_layers import RankMeasure, measure_memory

if TYPE_CHECKING:  # torch takes a second or two to import, and the leader wants to hear of this rank before
    from cluster.worker.connections import Connections

_log = logging.getLogger(__name__)

_SPIN_S = 50e-6  # after a step, for the next: as long as a sleeping processor takes to wake
_EXIT_GRACE_S = 2.0  # for the thread of the steps to end by itself once the leader is gone
_ENDING_S = 0.05  # between the first and the last rank that the end of their group reaches
_LAST_WORDS_S = 1.0  # for the leader to read why a shard fails


class StepRunner(Protocol):
    max_in_flight: int

    def launch(self, step: StepInput) -> Callable[[], StepOutput]: ...


class RunsSteps(Protocol):
    """A rank's part of the model; ``cluster.worker.shard.Shard`` is one."""

    @property
    def runner(self) -> StepRunner | None: ...

    def measure(self) -> StageTimes: ...

    def load(self, layers: tuple[int, int] | None = None) -> int: ...

    def allocate(self, num_blocks: int) -> ModelInfo: ...

    def shutdown(self) -> None: ...


CreateShard = Callable[[Join, "Callable[[], Connections]"], RunsSteps]
"""Makes a rank's shard; the second argument connects the rank to the others first, where the shard wants that."""


def create_shard(join: Join, connect_ranks: Callable[[], Connections]) -> RunsSteps:
    from cluster.worker.shard import Shard

    connections = connect_ranks()
    return Shard(
        Path(join.checkpoint),
        join.worker,
        max_num_seqs=join.max_num_seqs,
        max_num_batched_tokens=join.max_num_batched_tokens,
        layout=join.layout,
        tp=connections.tp,
        pp=connections.pp,
        tokens=connections.tokens,
    )


def run_shard(rank: int, address: str, secret: str, create_shard: CreateShard = create_shard) -> bool:
    """Is a rank of a group until the group ends; ends the process itself where its steps do not come to an end.

    Args:
        address, secret: as the launcher got them.

    Returns:
        Whether the leader ended it, not a failure here; that was told to the leader, and logged.

    Raises:
        ConnectionLost: the leader cannot be reached, or does not know the secret.
    """
    return _ShardWorker(rank, address, secret, create_shard).run()


class _ShardWorker:
    def __init__(self, rank: int, address: str, secret: str, create_shard: CreateShard) -> None:
        self._rank = rank
        self._secret = secret
        self._create_shard = create_shard
        self._work = self._say_hello(address, "work")
        self._control = self._say_hello(address, "control")
        self._connections: Connections | None = None
        self._shard: RunsSteps | None = None
        self._answers = False
        self._spin_s = 0.0
        self._collector: _Collector | None = None
        self._offers: dict[str, bytes] = {}
        self._leader_gone = threading.Event()
        self._finished = threading.Event()
        self._failing = threading.Lock()
        self._failed = False

    def _say_hello(self, address: str, channel: Literal["work", "control"]) -> FrameSocket:
        connection = connect(address, self._secret)
        hello = Hello(rank=self._rank, channel=channel, pid=os.getpid(), host=socket.gethostname(), machine=_machine())
        connection.send(encode(hello))
        return connection

    def run(self) -> bool:
        threading.Thread(target=self._heed_leader, name="shard-control", daemon=True).start()
        try:
            self._obey()
        except ConnectionLost:
            pass  # the leader is gone
        except Exception as error:
            self.fail(error)
        finally:
            with contextlib.suppress(Exception):  # the group ends one way or another
                self._release()
            self._finished.set()
            self._work.abort()
            self._control.abort()
        return not self._failed

    def fail(self, error: Exception) -> None:
        """Tells the leader why this rank ends, and gives it a moment to read it. The first failure counts."""
        from cluster.distributed.communicator import PeerLost

        by_peer = isinstance(error, PeerLost)
        # What the end of the group breaks is no news; and another rank may have been quicker to heed the leader.
        if self._leader_gone.wait(_ENDING_S if by_peer else 0.0):
            return
        with self._failing:
            if self._failed:
                return
            self._failed = True
        if by_peer:
            _log.error("rank %d ends: %s", self._rank, error)
        else:
            _log.error("rank %d failed", self._rank, exc_info=error)
        known = error if isinstance(error, ClusterError) else EngineFault(f"{type(error).__name__}: {error}")
        failed = Failed(reason=known.reason, message=known.message, field=known.field, by_peer=by_peer)
        with contextlib.suppress(ConnectionLost):
            self._control.send(encode(failed))
            self._leader_gone.wait(_LAST_WORDS_S)
        self._work.abort()  # wakes the thread that waits for steps

    def _heed_leader(self) -> None:
        """Answers pings whatever the steps do; when the leader ends the group, or is gone, so does this process."""
        with contextlib.suppress(ConnectionLost):
            while isinstance(message := decode_to_shard(self._control.receive()), Ping):
                self._control.send(encode(Pong(number=message.number)))
        self._leader_gone.set()
        self._work.abort()
        if self._connections is not None:
            self._connections.abort()
        if not self._finished.wait(_EXIT_GRACE_S):
            os._exit(1)  # it hangs in something that cannot be aborted

    def _obey(self) -> None:
        while True:
            try:
                message = decode_to_shard(self._work.receive(spin_s=self._spin_s))
            except ConnectionLost:
                return  # the leader ended the group; or its last bytes were rubbish, which ends it too
            if type(message) is Run:
                self._run(message.step)
            else:
                self._prepare(message)

    def _run(self, step: StepInput) -> None:
        assert self._shard is not None
        runner = self._shard.runner
        if runner is None:
            raise EngineFault(f"step {step.step_id} came before the shard was ready")
        if self._collector is None:
            self.answer(runner.launch(step)())
        else:
            self._collector.launch(runner, step)

    def answer(self, output: StepOutput) -> None:
        self._work.send(encode(Ran(output=output) if self._answers else Done(step_id=output.step_id)))

    def _prepare(self, message: ToShard) -> None:
        if isinstance(message, Offer):
            self._offers[message.key] = message.value
        elif isinstance(message, Join) and self._shard is None:
            self._join(message)
        elif isinstance(message, Load) and self._shard is not None:
            self._work.send(encode(Loaded(num_blocks=self._shard.load(message.layers))))
        elif isinstance(message, Allocate) and self._shard is not None:
            model = self._shard.allocate(message.num_blocks)
            runner = self._shard.runner
            assert runner is not None
            if runner.max_in_flight > 1:
                self._collector = _Collector(self, runner.max_in_flight)
            # What is there now stays: the collector of garbage must not look through it again while steps run.
            gc.collect()
            gc.freeze()
            self._work.send(encode(Allocated(model=model, max_in_flight=runner.max_in_flight)))
        else:
            raise EngineFault(f"the leader sent {type(message).__name__} out of turn")

    def _join(self, join: Join) -> None:
        layout = join.layout
        self._answers = layout.is_last_stage and layout.tp_rank == 0
        num_sharers, num_cores = join.machines.count(join.machines[self._rank]), len(os.sched_getaffinity(0))
        if num_sharers <= num_cores:  # else it would keep a core from a rank that has work
            self._spin_s = _SPIN_S
        if join.worker.num_threads is None:
            num_threads = max(1, num_cores // num_sharers)
            join = msgspec.structs.replace(join, worker=replace(join.worker, num_threads=num_threads))
        self._shard = self._create_shard(join, lambda: self._connect_ranks(join))
        measure = None
        if layout.pp_size > 1:
            device, device_bytes, free_bytes = measure_memory(join.worker, num_sharers)
            times = self._shard.measure()
            machine = join.machines[self._rank] if device == "cpu" else ""
            measure = RankMeasure(
                times=times, device=device, device_bytes=device_bytes, free_bytes=free_bytes, machine=machine
            )
        self._work.send(encode(Joined(measure=measure)))

    def _connect_ranks(self, join: Join) -> Connections:
        from cluster.worker.connections import Connections

        self._connections = Connections(join, self._secret, self, self._work.local_host)
        return self._connections

    def offer(self, key: str, value: bytes) -> None:
        self._work.send(encode(Offer(key=key, value=value)))

    def await_offer(self, key: str) -> bytes:
        while key not in self._offers:
            message = decode_to_shard(self._work.receive())
            if not isinstance(message, Offer):
                raise EngineFault(f"the leader sent {type(message).__name__} before the ranks were connected")
            self._offers[message.key] = message.value
        return self._offers[key]

    def _release(self) -> None:
        if self._collector is not None:
            self._collector.stop()
        if self._shard is not None:
            self._shard.shutdown()
        if self._connections is not None:
            self._connections.close()


class _Collector:
    """Waits for launched steps in a thread of its own, so that the next are launched meanwhile."""

    def __init__(self, worker: _ShardWorker, max_in_flight: int) -> None:
        self._worker = worker
        self._max_in_flight = max_in_flight
        self._free = threading.Semaphore(max_in_flight)
        self._has_ended = False
        self._launched: queue.SimpleQueue[Callable[[], StepOutput] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._collect, name="shard-collector", daemon=True)
        self._thread.start()

    def launch(self, runner: StepRunner, step: StepInput) -> None:
        self._free.acquire()
        if self._has_ended:
            raise ConnectionLost("the thread that collects steps has ended")
        self._launched.put(runner.launch(step))

    def stop(self) -> None:
        self._launched.put(None)
        self._thread.join(_EXIT_GRACE_S)

    def _collect(self) -> None:
        try:
            while (collect := self._launched.get()) is not None:
                self._worker.answer(collect())
                self._free.release()
        except ConnectionLost:
            pass  # the leader is gone
        except Exception as error:
            self._worker.fail(error)
        finally:
            self._has_ended = True
            self._free.release(self._max_in_flight)


def _machine() -> str:
    """Names what ranks have to share for shared memory: the running kernel, and the file system on /dev/shm."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    shared_memory = Path("/dev/shm")
    if not (boot_id.exists() and shared_memory.exists()):
        return socket.gethostname()
    return f"{boot_id.read_text().strip()}/{shared_memory.stat().st_dev}"
