"""Shards as subprocesses of the leader, all on its node."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import IO

from cluster.errors import EngineFault
from cluster.worker.shard_main import SECRET_VARIABLE

_COMMAND = (sys.executable, "-m", "cluster.worker.shard_main")
_LAST_LINES = 5
_REAP_TIMEOUT_S = 5.0  # a killed process that is longer in the kernel than that is left to it


class ProcessLauncher:
    """Implements Launcher. What shards write goes to this process's standard error, line by line, with their rank.

    Args:
        num_ranks: of the group; each gets its part of the cores, unless OMP_NUM_THREADS is set, and one of the CUDA
            devices.
        num_cuda_devices: that the ranks run on, in turns; 0: they run on CPU.
        command: what a rank runs, ``shard_main`` or something like it.
    """

    host: str | None = None

    def __init__(self, num_ranks: int, *, num_cuda_devices: int = 0, command: Sequence[str] = _COMMAND) -> None:
        self._num_ranks = num_ranks
        self._num_cuda_devices = num_cuda_devices
        self._command = command
        self._lock = threading.Lock()
        self._shards: dict[int, _Shard] = {}
        self._requests: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._starter: threading.Thread | None = None
        self._stopped = False

    def launch(self, rank: int, address: str, secret: str) -> None:
        done: Future[None] = Future()
        with self._lock:
            if self._stopped:
                raise EngineFault("a rank was launched after its group was stopped")
            if self._starter is None:
                self._starter = threading.Thread(target=self._start_shards, name="shard-starter", daemon=True)
                self._starter.start()
            self._requests.put((lambda: self._start(rank, address, secret), done))
        done.result()

    def ended(self, rank: int) -> str | None:
        shard = self._shards.get(rank)
        return None if shard is None else shard.ended()

    def stop(self) -> None:
        with self._lock:
            first, self._stopped = not self._stopped, True
            starter = self._starter
        if starter is None:
            return
        for shard in self._shards.values():
            shard.process.kill()
        for shard in self._shards.values():
            shard.finish()
        if first:
            self._requests.put(None)
        starter.join()

    def _start_shards(self) -> None:
        """Starts processes in a thread that lives as long as they: the kernel kills them when it ends."""
        # They inherit the mask: Ctrl-C in a terminal reaches them too, also while Python is starting there.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        while (request := self._requests.get()) is not None:
            start, done = request
            try:
                start()
            except OSError as error:
                done.set_exception(EngineFault(f"a shard's process cannot be started: {error}"))
            else:
                done.set_result(None)

    def _start(self, rank: int, address: str, secret: str) -> None:
        arguments = ("--rank", str(rank), "--address", address, "--parent", str(os.getpid()))
        self._shards[rank] = _Shard(rank, (*self._command, *arguments), self._environment(rank, secret))

    def _environment(self, rank: int, secret: str) -> dict[str, str]:
        environment = dict(os.environ) | {SECRET_VARIABLE: secret, "PYTHONUNBUFFERED": "1"}
        num_threads = max(1, len(os.sched_getaffinity(0)) // self._num_ranks)
        environment.setdefault("OMP_NUM_THREADS", str(num_threads))
        if self._num_cuda_devices:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(index) for index in range(self._num_cuda_devices)]
            environment["CUDA_VISIBLE_DEVICES"] = devices[rank % self._num_cuda_devices]
        return environment


class _Shard:
    """One process, and the thread that passes on what it writes."""

    def __init__(self, rank: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.rank = rank
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        assert self.process.stdout is not None
        self._forwarder = threading.Thread(
            target=self._forward, args=(self.process.stdout,), name=f"shard-{rank}-output", daemon=True
        )
        self._forwarder.start()

    def ended(self) -> str | None:
        status = self.process.poll()
        if status is None:
            return None
        if status < 0:
            return f"was killed by signal {-status} ({signal.strsignal(-status)})"
        self._forwarder.join(1.0)
        output = f"; its last output: {' | '.join(self._last_lines)}" if self._last_lines else ""
        return f"exited with status {status}{output}"

    def finish(self) -> None:
        """Waits for the killed process."""
        try:
            self.process.wait(_REAP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return
        self._forwarder.join(1.0)  # longer only where a process of the shard's own holds the pipe

    def _forward(self, output: IO[bytes]) -> None:
        for line in output:
            text = line.decode(errors="replace").rstrip()
            self._last_lines.append(text)
            print(f"[rank {self.rank}] {text}", file=sys.stderr, flush=True)
