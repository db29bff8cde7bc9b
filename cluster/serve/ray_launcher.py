"""Shards as Ray actors in the placement group of their replica. Ray starts them and tells of their death; what they
do comes over the group's own sockets.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import EngineFault
from cluster.serve.config import LoggingConfig
from cluster.serve.placement import Resources

_END_TIMEOUT_S = 5.0
_MAX_WORDS = 300


@ray.remote(max_restarts=0, max_task_retries=0)
class ShardActor:
    """The process of one rank. Made before there is work for it: what takes longest is the import of torch."""

    def __init__(self) -> None:
        import cluster.worker.shard  # noqa: F401

    def process(self) -> tuple[str, int]:
        """Ray's id of the node, and the pid there."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def run(self, rank: int, address: str, secret: str, model_path: str | None, logging: LoggingConfig) -> None:
        """Is a shard until the group ends, and does not return: the process ends with it.

        Args:
            model_path: as configured, where this may be another node than the leader's.
        """
        from cluster.checkpoint import resolve_checkpoint
        from cluster.observability.logging import configure_logging
        from cluster.worker.shard_worker import run_shard

        configure_logging(logging.level, logging.format)
        if model_path is not None:
            resolve_checkpoint(model_path)  # the leader names its own directory; the Hub's have to be fetched here too
        ended_by_leader = run_shard(rank, address, secret)
        # Without the interpreter's clean-up: threads of libraries may still be in a call that nothing ends.
        os._exit(0 if ended_by_leader else 1)


class RayLauncher:
    """Implements ``worker.Launcher``: a rank's actor runs in the bundle of its stage.

    Belongs in an actor that Serve has put into the first bundle. The actors are owned by that one: Ray ends them when
    it dies, and their sockets do so before.

    Args:
        num_ranks, tp_size: of the group, and of a stage.
        shard: what each reserves.
        model, model_path: name and path, as configured.
        host: this node's address, for shards on others.
    """

    def __init__(
        self,
        placement_group: PlacementGroup,
        num_ranks: int,
        tp_size: int,
        shard: Resources,
        *,
        model: str,
        model_path: str,
        host: str,
        logging: LoggingConfig,
    ) -> None:
        """Begins to start all actors."""
        self._placement_group = placement_group
        self._tp_size = tp_size
        self._shard = shard
        self._model = model
        self._model_path = model_path
        self._logging = logging
        nodes = set(placement_group_table(placement_group)["bundles_to_node_id"].values())
        self._node_id = ray.get_runtime_context().get_node_id()
        self.host = None if nodes == {self._node_id} else host
        self._lock = threading.Lock()
        self._actors = [self._start(rank) for rank in range(num_ranks)]
        self._processes = [actor.process.remote() for actor in self._actors]
        self._ends: dict[int, ray.ObjectRef] = {}
        self._stopped = False

    def _start(self, rank: int) -> ActorHandle:
        return ShardActor.options(
            num_cpus=self._shard.num_cpus,
            num_gpus=self._shard.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._placement_group,
                placement_group_bundle_index=rank // self._tp_size,
                placement_group_capture_child_tasks=False,
            ),
        ).remote()

    def launch(self, rank: int, address: str, secret: str) -> None:
        with self._lock:
            if self._stopped:
                raise EngineFault("a rank was launched after its group was stopped")
            model_path = None if self.host is None else self._model_path
            # The name is the process's title, and what Ray's dashboard shows.
            run = self._actors[rank].run.options(name=f"Shard:{self._model}:rank-{rank}")
            self._ends[rank] = run.remote(rank, address, secret, model_path, self._logging)

    def ended(self, rank: int) -> str | None:
        end = self._ends.get(rank)
        if end is None:
            return None
        try:
            ray.get(end, timeout=0)
        except GetTimeoutError:
            return None
        except ActorDiedError as error:
            because = re.search(r"is dead because (.+?)\.?(\s|$)(?=[A-Z]|$)", str(error))
            return f"ended; Ray says that {because[1]}" if because else "ended"
        except Exception as error:  # what it raised, or Ray in trouble
            return f"ended: {' '.join(str(error).split())[-_MAX_WORDS:]}"
        return "ended"

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
        for rank, actor in enumerate(self._actors):
            with contextlib.suppress(RayError):
                if self.ended(rank) is None:
                    self._kill_here(rank)
                ray.kill(actor, no_restart=True)
        if self._ends:
            ray.wait(list(self._ends.values()), num_returns=len(self._ends), timeout=_END_TIMEOUT_S)

    def _kill_here(self, rank: int) -> None:
        """At once, where the process is on this node: Ray asks it first, and it may be one that is stopped."""
        with contextlib.suppress(GetTimeoutError, ProcessLookupError):
            node_id, pid = ray.get(self._processes[rank], timeout=0)
            if node_id == self._node_id:
                os.kill(pid, signal.SIGKILL)
