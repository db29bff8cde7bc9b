"""What the engine needs from whoever runs the model; ``llm`` and ``serve`` inject one."""

from __future__ import annotations

from typing import Protocol

from cluster.core.model_info import ModelInfo
from cluster.core.step import StepInput, StepOutput

__all__ = ["Executor", "ModelInfo"]


class Executor(Protocol):
    """Runs steps in the order of submission. Called by one thread at a time.

    ``submit`` hands a step over and may return before it is done; ``collect`` blocks until the oldest step that was
    submitted and not yet collected is done. At most ``max_in_flight`` steps are under way. Both raise EngineFault when
    the model cannot go on; the executor is dead then.
    """

    model: ModelInfo
    max_in_flight: int

    def submit(self, step: StepInput) -> None: ...

    def collect(self) -> StepOutput: ...

    def shutdown(self) -> None:
        """Releases the model and its memory. Idempotent."""
