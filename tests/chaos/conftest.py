"""Clusters to be broken."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from byte_checkpoint import write_byte_checkpoint
from chaos_cluster import Chaos, CreateChaos, free_ports
from chaos_processes import ChaosProcess, serve_gateway, serve_replica
from fault_setup import create_faults  # noqa: F401 - a fixture

from cluster.gateway.replica_link import ReplicaAddress


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
async def create_chaos(checkpoint: Path) -> AsyncIterator[CreateChaos]:
    started: list[Chaos] = []

    async def create(*, num_replicas: int, num_gateways: int, step_s: float = 0.004) -> Chaos:
        ports = free_ports(num_replicas + num_gateways)
        replicas = [
            ChaosProcess(f"replica-{index}", ports[index], serve_replica, f"replica-{index}", step_s)
            for index in range(num_replicas)
        ]
        known = [ReplicaAddress(replica.name, replica.address) for replica in replicas]
        gateways = [
            ChaosProcess(f"gateway-{index}", ports[num_replicas + index], serve_gateway, checkpoint, known)
            for index in range(num_gateways)
        ]
        started.append(Chaos(replicas, gateways))
        await started[-1].start()
        return started[-1]

    yield create
    for chaos in started:
        await chaos.stop()
