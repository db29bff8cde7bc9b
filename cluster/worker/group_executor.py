"""A group of shards as the engine's executor."""

from __future__ import annotations

import time
import weakref
from collections import deque
from concurrent.futures import Future

from cluster.core.step import StepInput, StepOutput
from cluster.distributed.frames import ConnectionLost, ReceiveTimeout, to_frame
from cluster.errors import ClusterError, EngineFault
from cluster.worker.group_member import GroupLost, Member
from cluster.worker.messages import Done, Ran, Run, decode_from_shard, encode
from cluster.worker.shard_group import ShardGroup


class GroupExecutor:
    """Implements ``engine.Executor``: each step is encoded once and sent to all ranks, one of which answers it.

    Attributes:
        model: what the group has loaded.
        max_in_flight: of steps; one more than there are stages keeps all of them at work.
    """

    def __init__(self, group: ShardGroup, step_timeout_s: float) -> None:
        """
        Args:
            group: it is this executor's from here on.
            step_timeout_s: from when a step is waited for.
        """
        self.model = group.model
        self.max_in_flight = group.max_in_flight
        self._members = group.members
        self._answering = group.answering
        self._others = tuple(member for member in group.members if member is not group.answering)
        self._watch = group.watch
        self._step_timeout_s = step_timeout_s
        self._in_flight: deque[int] = deque()
        self._close = weakref.finalize(self, group.watch.end)

    @property
    def lost(self) -> Future[ClusterError]:
        """Becomes the error at once when a rank is lost, also while no step is under way. Callbacks must be quick, and
        run in a thread of the group's."""
        return self._watch.lost

    def submit(self, step: StepInput) -> None:
        if len(self._in_flight) == self.max_in_flight:
            raise EngineFault(f"step {step.step_id} was submitted before those under way were collected")
        frame = to_frame(encode(Run(step=step)))
        for member in self._members:
            try:
                member.work.send_frame(frame)
            except ConnectionLost as error:
                raise self._fault(member, error) from error
        self._in_flight.append(step.step_id)

    def collect(self) -> StepOutput:
        if not self._in_flight:
            raise EngineFault("no step is under way")
        step_id = self._in_flight.popleft()
        try:
            message = decode_from_shard(self._answering.work.receive(self._step_timeout_s))
        except ReceiveTimeout as error:
            raise self._late(step_id) from error
        except ConnectionLost as error:
            raise self._fault(self._answering, error) from error
        if not isinstance(message, Ran) or message.output.step_id != step_id:
            raise self._out_of_turn(self._answering)
        self._answering.done_step = step_id
        for member in self._others:
            self._take_in(member, step_id)
        return message.output

    def shutdown(self) -> None:
        """Ends the group's processes. Idempotent."""
        self._close()

    def _take_in(self, member: Member, step_id: int) -> None:
        """What a rank that does not answer steps has said it has done; it may be a little behind."""
        try:
            while member.done_step < step_id and (frame := member.work.try_receive()) is not None:
                message = decode_from_shard(frame)
                last = step_id + len(self._in_flight)
                if not isinstance(message, Done) or not member.done_step < message.step_id <= last:
                    raise self._out_of_turn(member)
                member.done_step = message.step_id
        except ConnectionLost as error:
            raise self._fault(member, error) from error

    def _fault(self, member: Member, error: ConnectionLost) -> EngineFault:
        return _as_fault(self._watch.await_fault(member, error))

    def _out_of_turn(self, member: Member) -> EngineFault:
        fault = GroupLost(f"{member} sent something that is no answer to the step", (member.rank,))
        return _as_fault(self._watch.lose(fault))

    def _late(self, step_id: int) -> EngineFault:
        """Ends the group because of a step that takes too long, and says who has not done it."""
        for member in self._others:
            self._take_in(member, step_id)
        late = [member for member in self._members if member.done_step < step_id]
        # A rank that is blocked by another answers pings.
        now, allowed_s = time.monotonic(), min(1.0, self._step_timeout_s / 4)
        hung = [member for member in late if member.silent_since is not None and now - member.silent_since > allowed_s]
        names = ", ".join(map(str, hung or late))
        waiting = ", ".join(str(member.rank) for member in late if member not in hung)
        why = "does not answer pings either" if hung else "has not done it"
        others = f"; with it waited rank {waiting}" if hung and waiting else ""
        return _as_fault(
            self._watch.lose(
                GroupLost(
                    f"step {step_id} has taken {self._step_timeout_s:g} s: {names} {why}{others}",
                    tuple(member.rank for member in hung or late),
                )
            )
        )


def _as_fault(error: ClusterError) -> EngineFault:
    return error if isinstance(error, EngineFault) else GroupLost(error.message)
