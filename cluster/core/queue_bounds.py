"""What a scheduler takes in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from cluster.core.request import Priority, Request
from cluster.core.running_batch import RunningBatch
from cluster.errors import InvalidRequest, Overloaded


class QueueBounds:
    """Refuses requests that could never run, and those that come when too many wait.

    Args:
        max_num_waiting: requests that may wait; each class may have its share of them in any case.
        share: of a class, in (0, 1].
        num_kv_tokens: that the whole pool holds.
    """

    def __init__(self, max_num_waiting: int, share: Callable[[Priority], float], num_kv_tokens: int) -> None:
        self._max_num_waiting = max_num_waiting
        self._share = share
        self._num_kv_tokens = num_kv_tokens

    def check(self, request: Request) -> None:
        """Raises InvalidRequest where a count is below 1, or the whole pool could not hold it."""
        if request.num_prompt_tokens < 1 or request.max_tokens < 1:
            raise InvalidRequest(
                f"request {request.request_id} has {request.num_prompt_tokens} prompt tokens and asks for "
                f"{request.max_tokens}; both must be at least 1"
            )
        # The last sampled token is never computed.
        num_tokens = request.num_prompt_tokens + request.max_tokens - 1
        if num_tokens > self._num_kv_tokens:
            raise InvalidRequest(
                f"request {request.request_id} needs KV for up to {num_tokens} tokens; the whole pool holds "
                f"{self._num_kv_tokens}",
                field="sampling.max_tokens",
            )

    def check_queue(self, requests: Sequence[Request], num_live: Mapping[Priority, int], batch: RunningBatch) -> None:
        """Raises Overloaded unless all of the requests may wait beside those that do already: all live ones of each
        class but for the running batch."""
        num_waiting = sum(num_live.values()) - len(batch)
        if num_waiting + len(requests) <= self._max_num_waiting:
            return
        running = Counter(tracked.request.priority for tracked in batch)
        for priority, num_new in Counter(request.priority for request in requests).items():
            guaranteed = self._share(priority) * self._max_num_waiting
            if num_live[priority] - running[priority] + num_new > guaranteed:
                raise Overloaded(
                    f"{num_waiting} sequences wait here and {len(requests)} more came; at most {self._max_num_waiting} "
                    f"may wait, and of class {priority.name} {int(guaranteed)} in any case"
                )
