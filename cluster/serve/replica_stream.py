"""One gateway's stream, as its replica writes it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict

from cluster.core.prefix_cache import CacheChanges
from cluster.engine.submission import Delta
from cluster.v1 import replica_pb2
from cluster.wire import finish_reason_to_proto, logprobs_to_proto


class ReplicaStream:
    """What is not yet written gathers in one frame, so a slow reader costs no extra messages. Lives on the event loop
    that it was made on.

    Attributes:
        submission_ids: of what is live on it: the gateway's ids to the engine's.
        pending: the next frame; ``touch`` has it written.
        touched_at: when that was asked for last, in monotonic seconds.
        told_blocks_at: when it was asked for last to say what has changed in the prefix cache.
        stuck: done when the gateway does not read.
    """

    def __init__(self) -> None:
        self.submission_ids: dict[int, int] = {}
        self.pending = replica_pb2.ReplicaFrame()
        self.touched_at = 0.0
        self.told_blocks_at = 0.0
        self.stuck: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._filled = asyncio.Event()
        self._flushed = asyncio.Event()
        self._flushed.set()
        # Net of what the gateway has been told, so that a block that comes and goes meanwhile is not told of at all.
        self._reset_blocks = False
        self._added_blocks: set[int] = set()
        self._removed_blocks: set[int] = set()
        self._tells_blocks = False

    @property
    def has_block_changes(self) -> bool:
        return bool(self._added_blocks or self._removed_blocks)

    def touch(self, now: float) -> None:
        """Has the pending frame written soon."""
        self.touched_at = now
        self._filled.set()
        self._flushed.clear()

    def append(self, wire_id: int, delta: Delta) -> None:
        """Runs once per token: fields at their default are left out."""
        message = self.pending.deltas.add(id=wire_id, candidate_index=delta.candidate_index, token_ids=delta.token_ids)
        if delta.logprobs:
            message.logprobs.extend(logprobs_to_proto(delta.logprobs))
        if delta.finish_reason is not None:
            message.finish_reason = finish_reason_to_proto(delta.finish_reason)
        if delta.cached_tokens:
            message.cached_tokens = delta.cached_tokens
        if delta.times is not None:
            message.times.CopyFrom(replica_pb2.StayTimes(**asdict(delta.times)))

    def reset_blocks(self, blocks: Iterable[int]) -> None:
        """The next frame says what is in the prefix cache, all of it."""
        self._reset_blocks = self._tells_blocks = True
        self._added_blocks, self._removed_blocks = set(blocks), set()

    def change_blocks(self, changes: CacheChanges) -> None:
        """The prefix cache has changed. ``tell_blocks`` has it said."""
        added, removed = self._added_blocks, self._removed_blocks
        for block in changes.added:
            removed.discard(block) if block in removed else added.add(block)
        for block in changes.removed:
            added.discard(block) if block in added else removed.add(block)

    def tell_blocks(self, now: float) -> None:
        """The next frame says what has changed in the prefix cache since it was told last."""
        self._tells_blocks = True
        self.told_blocks_at = now

    async def write(self, send: Callable[[replica_pb2.ReplicaFrame], Awaitable[None]]) -> None:
        """Sends what is pending, whenever there is something; never returns."""
        while True:
            await self._filled.wait()
            await send(self._take_pending())
            if not self._filled.is_set():
                self._flushed.set()

    async def flush(self) -> None:
        """Waits until all that was asked for is written."""
        await self._flushed.wait()

    def _take_pending(self) -> replica_pb2.ReplicaFrame:
        frame, self.pending = self.pending, replica_pb2.ReplicaFrame()
        self._filled.clear()
        if self._tells_blocks:
            frame.cached_blocks.CopyFrom(
                replica_pb2.CachedBlocks(
                    reset=self._reset_blocks, added=self._added_blocks, removed=self._removed_blocks
                )
            )
            self._reset_blocks = self._tells_blocks = False
            self._added_blocks, self._removed_blocks = set(), set()
        return frame
