"""AdminService: how the gateway stands, and what an operator may change while it runs."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Mapping
from typing import Any, Protocol

import grpc

from cluster.errors import InvalidRequest, Unsupported
from cluster.gateway.catalog import Catalog, CatalogEntry
from cluster.v1 import admin_pb2, admin_pb2_grpc
from cluster.wire import priority_to_proto

_DISTRIBUTION = "llm-cluster"
_MAX_TIMEOUT_MS = 86_400_000


class ModelControl(Protocol):
    """Whoever runs the replicas. Both methods return when it has been told, not when it is done."""

    async def load(self, model: str) -> None:
        """Starts as many replicas as are configured."""

    async def unload(self, model: str) -> None:
        """Drains and stops all of them."""


class Operated(Protocol):
    """The gateway as an operator sees it."""

    gateway_id: str
    num_generations: int
    draining: bool

    async def set_draining(self, draining: bool) -> None:
        """Whether it takes new generations.

        Raises:
            Draining: it is shutting down, for good.
        """

    async def publish_health(self) -> None:
        """Looks anew at whether it can serve."""

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no generation is open; False where some still were after ``timeout_s``."""


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """See admin.proto. Errors are raised; the interceptor maps them.

    Args:
        configuration: what is in force; it holds names of files, never secrets.
        models: None: nobody can start and stop replicas from here.
    """

    def __init__(
        self,
        gateway: Operated,
        catalog: Catalog,
        configuration: Mapping[str, Any],
        models: ModelControl | None,
    ) -> None:
        self._gateway = gateway
        self._catalog = catalog
        self._configuration = configuration
        self._models = models
        self._started_s = time.monotonic()

    async def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(
            gateway_id=self._gateway.gateway_id,
            version=importlib.metadata.version(_DISTRIBUTION),
            draining=self._gateway.draining,
            uptime_s=time.monotonic() - self._started_s,
            open_generations=self._gateway.num_generations,
            queues=[_queue(entry) for entry in self._catalog],
            models=[entry.balancer.describe() for entry in self._catalog],
        )

    async def GetConfig(
        self, request: admin_pb2.GetConfigRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.GetConfigResponse:
        return admin_pb2.GetConfigResponse(json=json.dumps(self._configuration))

    async def Drain(
        self, request: admin_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.DrainResponse:
        if request.timeout_ms > _MAX_TIMEOUT_MS:
            raise InvalidRequest(f"must be at most {_MAX_TIMEOUT_MS}", field="timeout_ms")
        timeout_s = request.timeout_ms / 1000 if request.HasField("timeout_ms") else None
        if request.replica_id:
            running = self._owner_of(request.replica_id).balancer.drain(request.replica_id, timeout_s)
            return admin_pb2.DrainResponse(running=running)
        await self._gateway.set_draining(True)
        if timeout_s is not None:
            await self._gateway.wait_idle(timeout_s)
        return admin_pb2.DrainResponse(running=self._gateway.num_generations)

    async def Undrain(
        self, request: admin_pb2.UndrainRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.UndrainResponse:
        if request.replica_id:
            self._owner_of(request.replica_id).balancer.undrain(request.replica_id)
        else:
            await self._gateway.set_draining(False)
        return admin_pb2.UndrainResponse()

    async def LoadModel(
        self, request: admin_pb2.LoadModelRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.LoadModelResponse:
        entry = self._catalog.lookup(request.model)
        await self._control().load(entry.name)
        self._catalog.set_loaded(entry.name, True)
        await self._gateway.publish_health()
        return admin_pb2.LoadModelResponse()

    async def UnloadModel(
        self, request: admin_pb2.UnloadModelRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.UnloadModelResponse:
        entry = self._catalog.lookup(request.model)
        await self._control().unload(entry.name)
        self._catalog.set_loaded(entry.name, False)
        await self._gateway.publish_health()
        return admin_pb2.UnloadModelResponse()

    def _control(self) -> ModelControl:
        if self._models is None:
            raise Unsupported("this gateway cannot start and stop replicas: nothing that runs them told it how")
        return self._models

    def _owner_of(self, replica_id: str) -> CatalogEntry:
        found = {replica.replica_id: entry for entry in self._catalog for replica in entry.balancer.describe().replicas}
        if replica_id not in found:
            names = ", ".join(sorted(found)) or "none"
            raise InvalidRequest(f"there is no replica {replica_id!r}; there is {names}", field="replica_id")
        return found[replica_id]


def _queue(entry: CatalogEntry) -> admin_pb2.ModelQueue:
    return admin_pb2.ModelQueue(
        model=entry.name,
        classes=[
            admin_pb2.ClassQueue(
                priority=priority_to_proto(priority),
                requests=backlog.requests,
                tokens=backlog.tokens,
                oldest_s=backlog.oldest_s,
            )
            for priority, backlog in sorted(entry.admission.backlog().items())
        ],
    )
