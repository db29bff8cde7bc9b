"""The way of sampled tokens from a pipeline's last stage, which draws them, to its first, which computes on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TokenSink(Protocol):
    """The last stage's end, held by its first tensor parallel rank."""

    def put(self, step_id: int, token_ids: Sequence[int]) -> None:
        """Sends a step's tokens to every rank of the first stage.

        Args:
            token_ids: one per sequence that samples, in the order of ``StepInput.scheduled``; -1: it failed.

        Raises:
            PeerLost: a rank of the first stage is gone.
        """


class TokenSource(Protocol):
    """The end of a rank of the first stage."""

    def get(self, step_id: int) -> Sequence[int]:
        """Waits for what was put for ``step_id``. Steps are asked for in ascending order, each once.

        Raises:
            PeerLost: it did not come by the deadline, or the last stage is gone.
        """
