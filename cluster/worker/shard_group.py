"""The leader's side of a group's start: places the ranks, joins them, splits the layers and the memory between them."""

from __future__ import annotations

import logging
import secrets
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from cluster.core.model_info import ModelInfo
from cluster.core.startup_ledger import Stage, StartupLedger
from cluster.distributed.config import ParallelConfig
from cluster.distributed.frames import ConnectionLost, FrameSocket, Listener
from cluster.distributed.layout import Layout
from cluster.worker.config import WorkerConfig
from cluster.worker.group_member import GroupLost, Member
from cluster.worker.group_watch import GroupWatch
from cluster.worker.launcher import Launcher
from cluster.worker.messages import (
    Allocate,
    Allocated,
    Hello,
    Join,
    Joined,
    Load,
    Loaded,
    Offer,
    decode_from_shard,
    encode,
)
from cluster.worker.stage_layers import RankMeasure, choose_layers

_log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
_LOOK_S = 0.05  # between looks for ranks that ended before they connected
Answer = TypeVar("Answer", Joined, Loaded, Allocated)
OnRank = Callable[[int, str, Stage], None]
"""Called with a rank, its node's name, and the stage that it has reached."""


@dataclass(frozen=True, kw_only=True)
class ShardGroup:
    """A group that is ready for steps.

    Attributes:
        members: by rank.
        answering: the member whose outputs are the group's.
        max_in_flight: steps that may be under way.
    """

    members: tuple[Member, ...]
    answering: Member
    watch: GroupWatch
    model: ModelInfo
    max_in_flight: int


def start_group(
    checkpoint: Path,
    worker: WorkerConfig,
    parallel: ParallelConfig,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    launcher: Launcher,
    on_stage: Callable[[str], None],
    on_rank: OnRank = lambda rank, node, stage: None,
) -> ShardGroup:
    """Starts a group and returns when it is ready; whatever goes wrong, nothing of it is left.

    Raises:
        GroupLost: a rank is late, or lost; the message names it, its node and what it was to do.
        ClusterError: what a rank found wrong with checkpoint, configuration or memory.
    """
    return _Start(
        checkpoint,
        worker,
        parallel,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        launcher=launcher,
        on_stage=on_stage,
        on_rank=on_rank,
    ).run()


class _Start:
    def __init__(
        self,
        checkpoint: Path,
        worker: WorkerConfig,
        parallel: ParallelConfig,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        launcher: Launcher,
        on_stage: Callable[[str], None],
        on_rank: OnRank,
    ) -> None:
        self._checkpoint = checkpoint
        self._worker = worker
        self._parallel = parallel
        self._tp_size, self._pp_size = parallel.sizes
        self._world_size = self._tp_size * self._pp_size
        self._max_num_seqs, self._max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self._launcher = launcher
        self._on_stage = on_stage
        self._on_rank = on_rank
        self._ledger = StartupLedger(self._world_size, parallel.start_timeout_s, time.monotonic())
        self._members: tuple[Member, ...] = ()

    def run(self) -> ShardGroup:
        began = time.monotonic()
        self._on_stage(f"starting {self._world_size} shards")
        try:
            self._members = self._place()
        except BaseException:
            self._launcher.stop()
            raise
        self._watch = GroupWatch(self._members, self._launcher, self._parallel.step_timeout_s)
        try:
            self._on_stage("connecting shards")
            measures = self._join()
            self._on_stage("loading weights")
            num_blocks = self._load(measures)
            self._on_stage("allocating KV cache and warming up")
            ready = self._warm_up(num_blocks)
        except BaseException:
            self._watch.end()
            raise
        self._watch.start_pings()
        _log.info("%d shards ready in %.1f s: %s", self._world_size, time.monotonic() - began, self._ledger.summary())
        answering = self._world_size - self._tp_size
        processors = {each.model.processor for each in ready}
        return ShardGroup(
            members=self._members,
            answering=self._members[answering],
            watch=self._watch,
            model=replace(ready[answering].model, processor="+".join(sorted(processors))),
            max_in_flight=self._pp_size + 1 if self._pp_size > 1 else ready[answering].max_in_flight,
        )

    def _place(self) -> tuple[Member, ...]:
        secret = secrets.token_hex(32)
        listener = Listener(secret, self._launcher.host)
        found: dict[int, dict[str, tuple[Hello, FrameSocket]]] = {rank: {} for rank in range(self._world_size)}
        try:
            for rank in found:
                self._launcher.launch(rank, listener.address, secret)
            while not self._ledger.is_complete:
                connection = listener.accept(min(_LOOK_S, self._ledger.deadline - time.monotonic()))
                if connection is not None:
                    self._admit(connection, found)
                else:
                    self._check_placing()
            return tuple(
                Member(hello=ends["control"][0], work=ends["work"][1], control=ends["control"][1])
                for ends in found.values()
            )
        except BaseException:
            for ends in found.values():
                for _, connection in ends.values():
                    connection.close()
            raise
        finally:
            listener.close()

    def _admit(self, connection: FrameSocket, found: dict[int, dict[str, tuple[Hello, FrameSocket]]]) -> None:
        try:
            hello = decode_from_shard(connection.receive(_HELLO_TIMEOUT_S))
            if not isinstance(hello, Hello) or hello.rank not in found or hello.channel in found[hello.rank]:
                raise ConnectionLost(f"it is no rank that is waited for: {hello}")
        except ConnectionLost as error:
            _log.warning("a connection to the group was refused: %s", error)
            connection.close()
            return
        found[hello.rank][hello.channel] = hello, connection
        if len(found[hello.rank]) == 2:
            self._ledger.place(hello.rank, hello.host, time.monotonic())
            self._on_rank(hello.rank, hello.host, Stage.PLACED)

    def _check_placing(self) -> None:
        for rank in self._ledger.missing:
            ended = self._launcher.ended(rank)
            if ended is not None:
                raise GroupLost(f"rank {rank} {ended}, before it had connected to the group", (rank,))
        late = self._ledger.lateness(time.monotonic())
        if late is not None:
            raise GroupLost(late, self._ledger.missing)

    def _join(self) -> list[RankMeasure | None]:
        for member in self._members:
            layout = Layout(rank=member.rank, tp_size=self._tp_size, pp_size=self._pp_size)
            join = Join(
                layout=layout,
                checkpoint=str(self._checkpoint),
                worker=self._worker,
                max_num_seqs=self._max_num_seqs,
                max_num_batched_tokens=self._max_num_batched_tokens,
                machines=tuple(member.hello.machine for member in self._members),
                communicator=self._parallel.communicator,
                start_timeout_s=self._parallel.start_timeout_s,
                step_timeout_s=self._parallel.step_timeout_s,
            )
            self._tell(member, encode(join))
        return [joined.measure for joined in self._gather(Stage.JOINED, Joined)]

    def _load(self, measures: list[RankMeasure | None]) -> int:
        layers = self._choose_layers(measures)
        for member in self._members:
            stage = member.rank // self._tp_size
            self._tell(member, encode(Load(layers=None if layers is None else layers[stage])))
        loaded = self._gather(Stage.LOADED, Loaded)
        return min(answer.num_blocks for answer in loaded)

    def _warm_up(self, num_blocks: int) -> list[Allocated]:
        for member in self._members:
            self._tell(member, encode(Allocate(num_blocks=num_blocks)))
        return self._gather(Stage.WARMED, Allocated)

    def _choose_layers(self, measures: list[RankMeasure | None]) -> tuple[tuple[int, int], ...] | None:
        """Layers of each stage; None: there is one, with all of them."""
        if self._pp_size == 1:
            return None
        known = [measure for measure in measures if measure is not None]
        if len(known) < self._world_size:
            raise self._watch.lose(GroupLost("a rank of a pipeline did not say what a layer takes it"))
        layers = choose_layers(
            self._checkpoint,
            self._worker,
            self._tp_size,
            known,
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
        )
        _log.info("layers of each stage: %s", ", ".join(f"{first} to {end - 1}" for first, end in layers))
        return layers

    def _tell(self, member: Member, payload: bytes) -> None:
        try:
            member.work.send(payload)
        except ConnectionLost as error:
            raise self._watch.await_fault(member, error) from error

    def _gather(self, stage: Stage, kind: type[Answer]) -> list[Answer]:
        """Every rank's answer, by rank."""
        self._ledger.begin(stage, time.monotonic())
        answers: dict[int, Answer] = {}
        poller = select.poll()
        by_file = {member.work.fileno(): member for member in self._members}
        for file in by_file:
            poller.register(file, select.POLLIN)
        while not self._ledger.is_complete:
            ready = poller.poll(max(0.0, self._ledger.deadline - time.monotonic()) * 1e3 + 1)
            for file, _ in ready:
                member = by_file[file]
                for message in self._messages(member):
                    if isinstance(message, Offer):
                        self._pass_on(member, message)
                    elif isinstance(message, kind) and member.rank not in answers:
                        answers[member.rank] = message
                        self._ledger.reach(member.rank, stage, time.monotonic())
                        self._on_rank(member.rank, member.hello.host, stage)
                    else:
                        what = f"{member} sent {type(message).__name__} out of turn"
                        raise self._watch.lose(GroupLost(what, (member.rank,)))
            late = self._ledger.lateness(time.monotonic())
            if late is not None:
                raise self._watch.lose(GroupLost(late, self._ledger.missing))
        return [answers[rank] for rank in sorted(answers)]

    def _messages(self, member: Member) -> Iterator[object]:
        try:
            while (frame := member.work.try_receive()) is not None:
                yield decode_from_shard(frame)
        except ConnectionLost as error:
            raise self._watch.await_fault(member, error) from error

    def _pass_on(self, sender: Member, offer: Offer) -> None:
        for member in self._members:
            if member is not sender:
                self._tell(member, encode(offer))
