"""Python scripts as processes: engines, gateways and clients of a benchmark."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

_HERE = Path(__file__).parent


class PlainProcess:
    """A script of this directory at work. A context manager: leaving it ends the process.

    Attributes:
        address: the first line that it printed.
    """

    def __init__(self, script: str, *arguments: object) -> None:
        """Starts it, and waits for its first line.

        Raises:
            RuntimeError: it ended without one.
        """
        command = [sys.executable, str(_HERE / script), *map(str, arguments)]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address = self._child.stdout.readline().strip()
        if not self.address:
            raise RuntimeError(f"{script} ended with {self._child.wait()} before it served")
        self._process = psutil.Process(self._child.pid)

    def __enter__(self) -> PlainProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    @property
    def pid(self) -> int:
        return self._child.pid

    def cpu_s(self) -> float:
        """Processor time so far, of all its threads, in user and system mode."""
        times = self._process.cpu_times()
        return times.user + times.system

    def rss_bytes(self) -> int:
        return self._process.memory_info().rss

    def num_fds(self) -> int:
        return self._process.num_fds()

    def num_tasks(self) -> int:
        """Of a gateway's event loop."""
        self._child.send_signal(signal.SIGUSR1)
        return int(self._child.stdout.readline())

    def terminate(self, timeout_s: float = 10.0) -> None:
        """SIGTERM, and SIGKILL where it has not ended in time. Idempotent."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self._child.stdout.close()

    def kill(self) -> None:
        """SIGKILL: no last words."""
        self._child.kill()
        self._child.wait()


async def wait_serving(
    address: str, *, credentials: grpc.ChannelCredentials | None = None, timeout_s: float = 60.0
) -> None:
    """Returns when the gateway there has ready replicas.

    Args:
        credentials: of TLS; None: no TLS.
    """
    open_channel = grpc.aio.insecure_channel(address)
    if credentials is not None:
        open_channel = grpc.aio.secure_channel(address, credentials)
    async with open_channel as channel, asyncio.timeout(timeout_s):
        async for health in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            if health.status == health_pb2.HealthCheckResponse.SERVING:
                return


def engines(*options: Sequence[object]) -> list[PlainProcess]:
    """A fake engine for each list of options, named replica-0 and so on."""
    return [
        PlainProcess("fake_engine.py", "--replica-id", f"replica-{index}", *one) for index, one in enumerate(options)
    ]


def gateway(engines: Sequence[PlainProcess], *options: object) -> PlainProcess:
    """A gateway in front of engines."""
    replicas = [("--replica", f"replica-{index}={engine.address}") for index, engine in enumerate(engines)]
    return PlainProcess("plain_gateway.py", *(word for pair in replicas for word in pair), *options)
