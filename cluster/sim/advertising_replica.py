"""A replica that tells gateways how it stands, as replicas do in production."""

from __future__ import annotations

from cluster.core.block_manager import BlockManager
from cluster.core.config import SchedulerConfig
from cluster.core.prefix_cache import CacheChanges
from cluster.core.scheduler import Scheduler
from cluster.core.step_pace import StepPace
from cluster.sim.latency import StepTimes
from cluster.sim.replica import Replica


class AdvertisingReplica(Replica):
    """Runs the production scheduler, measures its steps and says what it has cached.

    Attributes:
        config: of the scheduler.
        block_size: tokens per block.
        pace: of its steps, as measured.
    """

    def __init__(
        self, replica_id: str, config: SchedulerConfig, *, num_blocks: int, block_size: int, step_times: StepTimes
    ) -> None:
        self.config = config
        self.block_size = block_size
        self.pace = StepPace()
        self._num_blocks = num_blocks
        self._blocks: BlockManager
        self._steps: Scheduler
        super().__init__(replica_id, self._start, step_times)

    def _start(self) -> Scheduler:
        self.pace = StepPace()
        self._blocks = BlockManager(self._num_blocks, self.block_size)
        self._steps = Scheduler(self.config, self._blocks)
        return self._steps

    def finish(self) -> tuple[list[int], list[int]]:
        step = self.step
        results = super().finish()
        if step is not None:
            self.pace.observe(step.schedule, step.duration_s)
        return results

    @property
    def queued_tokens(self) -> int:
        """Of prompts, not yet computed."""
        return max(self._steps.num_queued_tokens - self._steps.num_running, 0)

    def take_cache_changes(self) -> CacheChanges:
        """What has come and gone in its prefix cache since the last call."""
        return self._blocks.take_cache_changes()
