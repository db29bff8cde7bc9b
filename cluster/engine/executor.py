"""What the engine needs from whoever runs the model; ``llm`` and ``serve`` inject one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cluster.core.step import StepInput, StepOutput


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a loaded model turned out to be.

    Attributes:
        architecture: as in the checkpoint's ``config.json``.
        max_model_len: prompt and completion together, in tokens.
        vocab_size: valid token ids are below this.
        eos_token_ids: ids that end a text.
        dtype: of weights and activations, e.g. ``"float32"``.
        device: e.g. ``"cpu"``, ``"cuda:0"``.
        num_blocks: KV blocks in the pool.
        block_size: tokens per block.
        backend: the model back end and kernels in use, in words.
    """

    architecture: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    num_blocks: int
    block_size: int
    backend: str

    @property
    def kv_capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size


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
