"""A small cluster of plain processes under load."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from chaos_load import ChaosClient
from chaos_processes import ChaosProcess

from cluster.client import AsyncClient
from cluster.errors import ClusterError
from cluster.serve.gateway_ports import is_free

STALL_S = 150.0  # nothing takes longer, not even where a hang has to be noticed first


@dataclass
class Chaos:
    """Gateways, replicas and the clients that ask them."""

    replicas: list[ChaosProcess]
    gateways: list[ChaosProcess]
    clients: list[ChaosClient] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def addresses(self) -> str:
        return ",".join(gateway.address for gateway in self.gateways)

    async def start(self) -> None:
        await asyncio.gather(*(process.start() for process in (*self.replicas, *self.gateways)))
        await self.settle()

    def load(self, num_clients: int, seed: int) -> None:
        self.clients = [ChaosClient(self.addresses, seed * 1000 + index) for index in range(num_clients)]
        self.tasks = [asyncio.create_task(client.run()) for client in self.clients]

    async def progress(self) -> None:
        """Until every client has got something from now on."""
        behind = {client: client.num_news for client in self.clients}
        deadline = time.monotonic() + STALL_S
        while True:
            behind = {client: count for client, count in behind.items() if client.num_news == count}
            if not behind:
                return
            stuck = [f"{client.ask} after {client.num_done} others" for client in behind]
            assert time.monotonic() < deadline, f"these got nothing for {STALL_S:g} s: {stuck}; wrong: {self.wrong()}"
            await asyncio.sleep(0.01)

    async def unload(self) -> None:
        """Lets every client finish what it is at."""
        for client in self.clients:
            client.end()
        async with asyncio.timeout(STALL_S):
            await asyncio.gather(*self.tasks)

    async def settle(self) -> None:
        """Until every gateway has all replicas, and nothing outstanding at any."""
        async with asyncio.timeout(STALL_S):
            for gateway in self.gateways:
                async with AsyncClient(gateway.address) as client:
                    while True:
                        if await _is_idle(client, len(self.replicas)):
                            break
                        await asyncio.sleep(0.05)

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for process in (*self.gateways, *self.replicas):
            await process.end(signal.SIGKILL)

    def wrong(self) -> list[str]:
        return [problem for client in self.clients for problem in client.wrong]


async def _is_idle(client: AsyncClient, num_replicas: int) -> bool:
    try:
        (model,) = await client.models()
    except ClusterError:
        return False
    # One that died often is there again and yet ejected, until a request has probed it.
    return len(model.replicas) == num_replicas and all(
        one.state in ("ready", "ejected") and one.outstanding_tokens == 0 for one in model.replicas
    )


def free_ports(count: int) -> list[int]:
    """Not of those that connections get at their near end: one of these could sit on the port of a dead process."""
    ports = random.sample(range(20_000, 30_000), 20 * count)
    return [port for port in ports if is_free("127.0.0.1", port)][:count]


CreateChaos = Callable[..., Awaitable[Chaos]]
