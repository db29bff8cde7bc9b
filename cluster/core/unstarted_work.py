"""What was sent to one replica and has not begun to answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.core.prefix_index import common_prefix
from cluster.core.request import Priority
from cluster.core.routing import Placement


@dataclass(frozen=True, slots=True)
class _Prompt:
    """``num_uncached_tokens`` of its ``num_tokens`` are expected to be computed."""

    priority: Priority
    num_tokens: int
    num_uncached_tokens: int
    block_hashes: Sequence[int]


class UnstartedWork:
    """A sender's view of the prompts that wait or are being computed at one replica; each leaves with its first token.

    It bounds what the sender hands over, so that most of what waits does so where it can be ordered among all, and says
    what a new prompt would have to wait for.

    Attributes:
        num_uncached_tokens: of all these prompts, expected to be computed.
    """

    def __init__(self) -> None:
        self.num_uncached_tokens = 0
        self._num_tokens = 0
        self._prompts: dict[int, _Prompt] = {}
        self._num_by_class: Counter[Priority] = Counter()
        self._tokens_by_class: Counter[Priority] = Counter()

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, submission_id: int, placement: Placement, cached_tokens: int) -> None:
        """It was sent; so many tokens of its prompt are expected to be found at the replica."""
        prompt = _Prompt(
            placement.priority,
            placement.num_prompt_tokens,
            placement.num_prompt_tokens - cached_tokens,
            placement.block_hashes,
        )
        self._prompts[submission_id] = prompt
        self._num_by_class[prompt.priority] += 1
        self._tokens_by_class[prompt.priority] += prompt.num_uncached_tokens
        self.num_uncached_tokens += prompt.num_uncached_tokens
        self._num_tokens += prompt.num_tokens

    def remove(self, submission_id: int) -> bool:
        """Its first token has come, or it has ended. False where it had left before."""
        prompt = self._prompts.pop(submission_id, None)
        if prompt is None:
            return False
        self._num_by_class[prompt.priority] -= 1
        self._tokens_by_class[prompt.priority] -= prompt.num_uncached_tokens
        self.num_uncached_tokens -= prompt.num_uncached_tokens
        self._num_tokens -= prompt.num_tokens
        return True

    def has_room(self, priority: Priority, window_tokens: float) -> bool:
        """Whether one more may be sent: the window is not full, or this class has less than half of one, or nothing. So
        a step, half a window, can always be filled by any class, however much of others was sent before."""
        return (
            self.num_uncached_tokens < window_tokens
            or self._tokens_by_class[priority] < window_tokens / 2
            or self._num_by_class[priority] == 0
        )

    def backlog_tokens(self, priority: Priority, queued_tokens: int) -> int:
        """Prompt tokens that would be computed before those of a new request of this class.

        Args:
            queued_tokens: prompt tokens not yet computed, of all senders, as the replica says. What of it is not ours
                is counted whole: of which class it is, and how much of it is cached, is not known here.
        """
        ours = sum(num_tokens for each, num_tokens in self._tokens_by_class.items() if each <= priority)
        return ours + max(queued_tokens - self._num_tokens, 0)

    def match(self, block_hashes: Sequence[int]) -> int:
        """How many of a prompt's blocks, from its first one on, are about to be computed for another."""
        return max((common_prefix(prompt.block_hashes, block_hashes) for prompt in self._prompts.values()), default=0)
