"""Gateways and replicas without a model as plain processes, to be killed. Forked from a server that has imported all
that they need, so that one is there again within a fraction of a second.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from fake_replica import SECRET, FakeReplica

from cluster.gateway.config import GatewayConfig
from cluster.gateway.replica_link import ReplicaAddress
from cluster.gateway.security_config import AdminConfig
from cluster.gateway.server import Gateway, ServedModel

START_TIMEOUT_S = 60.0
_DRAIN_S = 0.5

_context = multiprocessing.get_context("forkserver")
# Not this module: the server's own path does not lead to the tests.
_context.set_forkserver_preload(["uvloop", "cluster.gateway.server"])


class ChaosProcess:
    """A role at its address, by whatever process; each start is a new one on the same port."""

    def __init__(self, name: str, port: int, serve: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """``serve`` gets the port, a connection on which it says that it serves, and ``arguments``."""
        self.name = name
        self.address = f"127.0.0.1:{port}"
        self._port = port
        self._serve = serve
        self._arguments = arguments
        self._process: Any = None

    async def start(self) -> None:
        """Returns when it serves."""
        ours, theirs = _context.Pipe()
        self._process = _context.Process(
            target=_run, args=(self._serve, self._port, theirs, *self._arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        assert await asyncio.to_thread(ours.poll, START_TIMEOUT_S), f"{self.name} does not start"
        assert ours.recv() == "serving"
        ours.close()

    def send(self, number: int) -> None:
        os.kill(self._process.pid, number)

    async def end(self, number: int = signal.SIGKILL) -> None:
        """Sends the signal and waits until the process is gone."""
        if self._process is not None and self._process.is_alive():
            self.send(number)
            await asyncio.to_thread(self._process.join, START_TIMEOUT_S)
            assert not self._process.is_alive(), f"{self.name} does not end"


def _run(serve: Callable[..., Awaitable[None]], port: int, connection: Connection, *arguments: Any) -> None:
    uvloop.run(serve(port, connection, *arguments))


def _on_sigterm() -> asyncio.Event:
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    return told


async def serve_replica(port: int, connection: Connection, replica_id: str, step_s: float) -> None:
    """Until SIGTERM: then it drains for a moment, and hands back what still runs, as a real one does."""
    replica = FakeReplica(replica_id=replica_id, step_s=step_s, port=port)
    told = _on_sigterm()
    await replica.start()
    connection.send("serving")
    await told.wait()
    await replica.drain()
    await asyncio.sleep(_DRAIN_S)
    await replica.hand_back("the replica has drained long enough")
    await asyncio.sleep(_DRAIN_S)
    await replica.stop()


async def serve_gateway(
    port: int, connection: Connection, checkpoint: Path, replicas: Sequence[ReplicaAddress]
) -> None:
    """Until SIGTERM: then it drains for a moment."""
    config = GatewayConfig(port=port, http_port=None, admin=AdminConfig(port=0))
    gateway = Gateway(config, [ServedModel("test", checkpoint)], secret=SECRET)
    told = _on_sigterm()
    await gateway.start()
    gateway.set_replicas("test", replicas)
    connection.send("serving")
    await told.wait()
    await gateway.drain(_DRAIN_S)
    await gateway.stop()
