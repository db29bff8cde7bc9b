"""The Serve deployment of one model: each replica is an engine with its own socket for gateways."""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import Future

import ray
from ray import serve
from ray.util.placement_group import get_current_placement_group

from cluster.core.config import ClassesConfig
from cluster.core.startup_ledger import Stage
from cluster.engine.submission import EngineLoad
from cluster.errors import ClusterError, EngineFault
from cluster.observability.logging import configure_logging
from cluster.observability.metrics import KV_USAGE, PREEMPTIONS, REPLICA_INFO, RUNNING, WAITING
from cluster.serve.addresses import join_host_port
from cluster.serve.config import ModelConfig
from cluster.serve.engine_thread import Engine
from cluster.serve.identity import ClusterIdentity
from cluster.serve.placement import Resources
from cluster.serve.ray_metrics import RaySink
from cluster.serve.replica_server import ReplicaServer
from cluster.serve.startup_report import StartupReport
from cluster.worker.launcher import Launcher

_METRICS_INTERVAL_S = 1.0
_FAULT_GRACE_S = 0.5
_NEXT_STAGE = {Stage.PLACED: "joining", Stage.JOINED: "loading weights", Stage.LOADED: "warming up"}

logger = logging.getLogger(__name__)


class ModelReplica:
    """One engine. Serve builds, checks, replaces and stops it; gateways find its address in its metadata."""

    _metrics: asyncio.Task[None] | None = None  # from when it serves

    async def __init__(  # type: ignore[misc]
        self, model: ModelConfig, classes: ClassesConfig, shard: Resources, identity: ClusterIdentity
    ) -> None:
        """
        Args:
            classes: of priority, the same for all models.
            shard: reserved by each shard of a group, in the placement group that this actor is in.
        """
        configure_logging(identity.logging.level, identity.logging.format)
        self._model = model
        self._classes = classes
        self._shard = shard
        self._identity = identity
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._report = StartupReport(identity.start_id, f"{model.name} {self._replica_id}", self._replica_id)
        self._rank_reports: dict[int, StartupReport] = {}
        self._host = identity.replica_host or ray.util.get_node_ip_address()
        self._server = ReplicaServer(
            self._create_engine,
            replica_id=self._replica_id,
            model=model.name,
            secret=identity.secret,
            credentials=identity.certificate and identity.certificate.server_credentials(),
            limits=model.engine,
            group=ray.get_runtime_context().get_node_labels().get(model.group_label, ""),
            host=self._host,
            on_fault=self._end,
        )
        try:
            self._port = await self._server.start()
        except BaseException as error:
            self._report.fail(error)
            await self._server.stop()
            raise
        info = self._server.model_info
        self._report.finish(
            model=model.name,
            architecture=info.architecture,
            max_model_len=info.max_model_len,
            dtype=info.dtype,
            device=info.device,
            kv_capacity_tokens=info.kv_capacity_tokens,
            backend=info.backend,
            tp_size=info.tp_size,
            pp_size=info.pp_size,
        )
        self._metrics = asyncio.create_task(self._export_metrics())

    def record_replica_metadata(self) -> dict[str, str]:
        """What Serve hands to gateways when this replica is running."""
        return {"address": join_host_port(self._host, self._port)}

    async def check_health(self) -> None:
        """Raises EngineFault where the engine is dead or stuck. That this runs at all shows that the loop lives."""
        self._server.check()

    async def __del__(self) -> None:
        # Serve calls this once, before the process ends, and Python where construction failed.
        if self._metrics is None:
            return
        self._metrics.cancel()
        if not await self._server.drain(self._model.drain_timeout_s):
            logger.warning(
                "replica %s has handed back what still ran when it had drained long enough", self._replica_id
            )
        await self._server.stop()

    def _create_engine(self) -> Engine:
        """Runs in the engine's thread."""
        parallel = self._model.parallel
        self._report.enter("importing torch")
        launcher = None if parallel.is_single else self._create_launcher()
        from cluster.checkpoint import resolve_checkpoint
        from cluster.engine.engine import Engine as TokenEngine
        from cluster.worker.executors import create_executor
        from cluster.worker.group_executor import GroupExecutor

        self._report.enter("finding the checkpoint")
        checkpoint = resolve_checkpoint(self._model.path)
        limits = self._model.engine.scheduler
        executor = create_executor(
            checkpoint,
            self._model.worker,
            parallel,
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            on_stage=self._report.enter,
            launcher=launcher,
            on_rank=self._report_rank,
        )
        if isinstance(executor, GroupExecutor):
            executor.lost.add_done_callback(self._lose)
        return TokenEngine(executor, self._model.engine, classes=self._classes)

    def _report_rank(self, rank: int, node: str, reached: Stage) -> None:
        """What a rank has reached, as the stage that begins then."""
        if reached is Stage.PLACED:
            title = f"{self._model.name} {self._replica_id} rank {rank} on {node}"
            self._rank_reports[rank] = StartupReport(self._identity.start_id, title, f"{self._replica_id}-{rank}")
        report = self._rank_reports[rank]
        if reached in _NEXT_STAGE:
            report.enter(_NEXT_STAGE[reached])
        else:
            report.finish()

    def _lose(self, lost: Future[ClusterError]) -> None:
        """A shard is gone, whatever the engine is doing. Runs in the group's thread."""
        if not lost.cancelled():
            self._server.lose(EngineFault(lost.result().message))

    def _create_launcher(self) -> Launcher:
        from cluster.serve.ray_launcher import RayLauncher

        placement_group = get_current_placement_group()
        if placement_group is None:
            raise EngineFault("the replica of a group was started outside of its placement group")
        tp_size, pp_size = self._model.parallel.sizes
        return RayLauncher(
            placement_group,
            tp_size * pp_size,
            tp_size,
            self._shard,
            model=self._model.name,
            model_path=self._model.path,
            host=self._host,
            logging=self._identity.logging,
        )

    def _end(self, fault: EngineFault) -> None:
        """A replica without an engine is worth nothing: it ends as one, and Serve builds another."""
        logger.error("replica %s ends: %s", self._replica_id, fault.message)
        # The failures are still on their way to the gateways.
        asyncio.get_running_loop().call_later(_FAULT_GRACE_S, os._exit, 1)

    async def _export_metrics(self) -> None:
        sink, labels = RaySink(), {"model": self._model.name, "replica": self._replica_id}
        info = self._server.model_info
        sink.record(REPLICA_INFO, 1, device=info.device, kernels=info.kernels, weights=info.weights, **labels)
        preemptions, exported = 0, None
        while True:
            load: EngineLoad = self._server.load
            if load != exported:
                sink.record(RUNNING, load.running, **labels)
                sink.record(WAITING, load.waiting, **labels)
                sink.record(KV_USAGE, 1 - load.free_blocks / load.num_blocks, **labels)
                sink.record(PREEMPTIONS, load.num_preemptions - preemptions, **labels)
                preemptions, exported = load.num_preemptions, load
            await asyncio.sleep(_METRICS_INTERVAL_S)
