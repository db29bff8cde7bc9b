"""A server under load, whatever protocol it speaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.core.request import Priority


@dataclass(frozen=True, kw_only=True)
class TargetModel:
    """What a server says of the model.

    Attributes:
        vocab_size: None: it does not say.
    """

    name: str
    vocab_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a finished request says of itself; None and 0: nothing."""

    num_new_tokens: int | None = None
    cached_tokens: int = 0
    num_moves: int = 0


class TargetFailure(Exception):
    """A request that was refused, failed, or lost its connection.

    Attributes:
        status: short and the same for the same cause, such as "RESOURCE_EXHAUSTED (OVERLOADED)".
        retry_after_s: what a refusal advised.
    """

    def __init__(self, status: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.retry_after_s = retry_after_s


class Target(Protocol):
    """Made and used on one event loop."""

    async def model(self) -> TargetModel:
        """The model under load.

        Raises:
            ClusterError: nobody answers, or there is no such model.
        """

    async def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        priority: Priority,
        seed: int,
        deadline_s: float,
        on_tokens: Callable[[int], None],
    ) -> Answer:
        """Streams one completion of exactly so many tokens, without trying again.

        Args:
            on_tokens: called at each message with tokens, with their number, 1 where that is not told.

        Raises:
            TargetFailure: it did not get to its end.
        """

    async def close(self) -> None: ...
