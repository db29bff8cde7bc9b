"""What a group's leader and its shards tell each other. Data only: nothing that arrives is ever executed.

A connection carries one kind of traffic. On ``work`` the leader sends what a shard does, in order, and the shard
answers each; on ``control`` travel pings, which a shard answers whatever it is doing, and the last words of one that
fails.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from cluster.core.model_info import ModelInfo
from cluster.core.step import StepInput, StepOutput
from cluster.distributed.frames import ConnectionLost
from cluster.distributed.layout import Layout
from cluster.worker.config import WorkerConfig
from cluster.worker.stage_layers import RankMeasure


class _Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=True):
    """Travels as a MessagePack array: its name, then its fields."""


class Hello(_Message, frozen=True):
    """First frame of each of a shard's connections.

    Attributes:
        host: the node's name, for people.
        machine: equal for two ranks exactly if they share ``/dev/shm``.
    """

    rank: int
    channel: Literal["work", "control"]
    pid: int
    host: str
    machine: str


class Join(_Message, frozen=True):
    """What the shard is a part of. Answered by Joined.

    Attributes:
        checkpoint: a directory on the shard's node.
        machines: of every rank, as in Hello.
        communicator, start_timeout_s, step_timeout_s: as in ParallelConfig.
    """

    layout: Layout
    checkpoint: str
    worker: WorkerConfig
    max_num_seqs: int
    max_num_batched_tokens: int
    machines: tuple[str, ...]
    communicator: Literal["auto", "nccl", "shm", "gloo"]
    start_timeout_s: float
    step_timeout_s: float


class Offer(_Message, frozen=True):
    """Something that one rank tells the others while they join, e.g. where it listens; the leader passes it on."""

    key: str
    value: bytes


class Joined(_Message, frozen=True):
    """The communicators are there.

    Attributes:
        measure: where there is more than one stage.
    """

    measure: RankMeasure | None = None


class Load(_Message, frozen=True):
    """The decoder layers to load, first and last + 1; None: all. Answered by Loaded."""

    layers: tuple[int, int] | None


class Loaded(_Message, frozen=True):
    """``num_blocks``: KV blocks that fit beside the weights."""

    num_blocks: int


class Allocate(_Message, frozen=True):
    """KV blocks to take. Answered by Allocated."""

    num_blocks: int


class Allocated(_Message, frozen=True):
    """Warm, and ready for steps; ``max_in_flight`` is the shard's own."""

    model: ModelInfo
    max_in_flight: int


class Done(_Message, frozen=True):
    """A step is done on a rank that does not answer it with a StepOutput."""

    step_id: int


class Ping(_Message, frozen=True):
    number: int


class Pong(_Message, frozen=True):
    number: int


class Failed(_Message, frozen=True):
    """The shard cannot go on, and ends.

    Attributes:
        reason, message, field: of the error, as in ``cluster.errors``.
        by_peer: it only noticed that another rank is gone.
    """

    reason: str
    message: str
    field: str = ""
    by_peer: bool = False


class Run(_Message, frozen=True):
    """Work for one step, the same for all ranks. Answered by Ran or Done."""

    step: StepInput


class Ran(_Message, frozen=True):
    output: StepOutput


ToShard = Join | Offer | Load | Allocate | Run | Ping
FromShard = Hello | Offer | Joined | Loaded | Allocated | Ran | Done | Pong | Failed

T = TypeVar("T")


class MalformedMessage(ConnectionLost):
    """A frame that is no message of this version, in this direction."""


_encoder = msgspec.msgpack.Encoder()
_to_shard: msgspec.msgpack.Decoder[ToShard] = msgspec.msgpack.Decoder(ToShard)
_from_shard: msgspec.msgpack.Decoder[FromShard] = msgspec.msgpack.Decoder(FromShard)


def encode(message: _Message) -> bytes:
    return _encoder.encode(message)


def decode_to_shard(frame: bytes | memoryview) -> ToShard:
    """Raises MalformedMessage where the frame is no message to a shard."""
    return _decode(_to_shard, frame)


def decode_from_shard(frame: bytes | memoryview) -> FromShard:
    """Raises MalformedMessage where the frame is no message from a shard."""
    return _decode(_from_shard, frame)


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes | memoryview) -> T:
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise MalformedMessage(f"a frame of {len(frame)} bytes is no message: {error}") from error
