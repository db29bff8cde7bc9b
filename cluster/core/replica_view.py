"""What a gateway knows of one replica: what it has sent there, and what the replica has said since."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cluster.core.prefix_index import PrefixIndex
from cluster.core.request import Priority
from cluster.core.routing import Placement, ReplicaSnapshot
from cluster.core.unstarted_work import UnstartedWork

_WINDOW_STEPS = 2  # of prompts that have not begun: one is computed, one waits


class ReplicaView:
    """Keeps the books from which snapshots for routing are made.

    Attributes:
        queued_tokens: prompt tokens not yet computed, of all gateways, as the replica said last.
        step_s: what one of its steps takes without prompts, as it said last; 0: not known.
        prompt_token_s: what each token of a prompt adds to a step, as it said last; 0: not known.

    Args:
        block_size: tokens of the blocks that it advertises.
        max_num_batched_tokens: in one of its steps; 0: not known, and so no bound to what is sent.
        group: zone, rack or accelerator class; empty: of none.
        model_digest: of its weights.
        fingerprint: equal for replicas that generate the same tokens.
    """

    def __init__(
        self,
        replica_id: str,
        *,
        block_size: int = 0,
        max_num_batched_tokens: int = 0,
        group: str = "",
        model_digest: str = "",
        fingerprint: str = "",
    ) -> None:
        self.replica_id = replica_id
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.group = group
        self.model_digest = model_digest
        self.fingerprint = fingerprint
        self.queued_tokens = 0
        self.step_s = 0.0
        self.prompt_token_s = 0.0
        self._cached = PrefixIndex()
        self._unstarted = UnstartedWork()

    def hear_of_blocks(self, *, reset: bool, added: Iterable[int], removed: Iterable[int]) -> None:
        """What has changed in its prefix cache; told before that requests of the same step have begun."""
        self._cached.apply(reset=reset, added=added, removed=removed)

    def send(self, submission_id: int, placement: Placement) -> None:
        """A request goes there."""
        self._unstarted.add(submission_id, placement, self.cached_tokens(placement))

    def begin(self, submission_id: int) -> bool:
        """Its first token has come, or it has ended. False where it had begun before."""
        return self._unstarted.remove(submission_id)

    def cached_tokens(self, placement: Placement) -> int:
        """How much of a prompt will not have to be computed: found in the replica's cache, or about to be there.

        Its last token always is: its logits are wanted.
        """
        hashes = placement.block_hashes
        if not hashes:
            return 0
        num_blocks = max(self._cached.match(hashes), self._unstarted.match(hashes))
        return min(num_blocks * self.block_size, placement.num_prompt_tokens - 1)

    def has_room(self, priority: Priority, weight: float = 1.0) -> bool:
        """Whether one more request of this class may be sent now.

        Args:
            weight: which part of the usual may be under way.
        """
        window_tokens = weight * _WINDOW_STEPS * self.max_num_batched_tokens
        return self._unstarted.has_room(priority, window_tokens or math.inf)

    def snapshot(
        self, placement: Placement, *, outstanding_tokens: int, ready: bool, ready_s: float = math.inf
    ) -> ReplicaSnapshot:
        """The replica for one request.

        Args:
            outstanding_tokens: prompt and completion tokens that were sent there and are not done.
            ready: whether it takes work.
            ready_s: for how long it has, in seconds.
        """
        return ReplicaSnapshot(
            replica_id=self.replica_id,
            ready=ready,
            outstanding_tokens=outstanding_tokens,
            group=self.group,
            model_digest=self.model_digest,
            fingerprint=self.fingerprint,
            ready_s=ready_s,
            backlog_tokens=self._unstarted.backlog_tokens(placement.priority, self.queued_tokens),
            cached_tokens=self.cached_tokens(placement),
            step_s=self.step_s,
            prompt_token_s=self.prompt_token_s,
            max_num_batched_tokens=self.max_num_batched_tokens,
        )
