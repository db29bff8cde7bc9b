"""The whole model in this process: the executor of replicas with one shard, and of ``LLM``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cluster import kernels
from cluster.core.step import StepInput, StepOutput
from cluster.errors import ClusterError, EngineFault
from cluster.worker.config import WorkerConfig
from cluster.worker.shard import Runner, Shard

T = TypeVar("T")


class LocalExecutor:
    """Implements ``engine.Executor`` in process. A step runs inside ``collect``; on CUDA with our own kernels it is
    queued on the device by ``submit``.

    Attributes:
        model: what was loaded.
        max_in_flight: 1, and 2 where steps are queued.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: WorkerConfig,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        """Loads the model and takes its memory.

        Args:
            checkpoint: a directory in Hugging Face's layout.
            max_num_seqs, max_num_batched_tokens: the largest step, as in SchedulerConfig.
            on_stage: called with each stage's name as it begins.

        Raises:
            CheckpointError: the checkpoint is broken; the message names the file, tensor or key.
            Unsupported: an architecture or format that this version does not run.
            ConfigError: device, context or memory do not fit; the message says what to change.
        """
        self._launched: deque[Callable[[], StepOutput]] = deque()
        self._fault: EngineFault | None = None
        self._shard = Shard(
            checkpoint,
            config,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            on_stage=on_stage,
        )
        self.model = self._shard.allocate(self._shard.load())
        self._runner: Runner | None = self._shard.runner
        assert self._runner is not None
        self.max_in_flight = self._runner.max_in_flight

    def submit(self, step: StepInput) -> None:
        if self._fault is not None:
            raise self._fault
        if self._runner is None:
            raise EngineFault("a step was submitted after shutdown")
        if len(self._launched) == self.max_in_flight:
            raise EngineFault(f"step {step.step_id} was submitted before those under way were collected")
        runner = self._runner
        self._launched.append(self._guarded(lambda: runner.launch(step)))

    def collect(self) -> StepOutput:
        if self._fault is not None:
            raise self._fault
        if not self._launched:
            raise EngineFault("no step is under way")
        return self._guarded(self._launched.popleft())

    def _guarded(self, run: Callable[[], T]) -> T:
        """What ``run`` gives; the executor is dead where it raises."""
        kernels.use(self._shard.backend)  # another model of this process may run on others
        try:
            return run()
        except Exception as error:
            self._fault = as_fault(error)
            raise self._fault from error

    def shutdown(self) -> None:
        """Releases the model and its memory. Idempotent."""
        self._runner = None
        self._launched.clear()
        self._shard.shutdown()


def as_fault(error: Exception) -> EngineFault:
    """What ends a model that failed in a step, in words."""
    if isinstance(error, EngineFault):
        return error
    if isinstance(error, ClusterError):
        return EngineFault(error.message)
    return EngineFault(f"the forward pass failed: {type(error).__name__}: {error}")
