"""What a client gets back: plain frozen dataclasses, so that no caller needs protobuf."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cluster.core.request import FinishReason
from cluster.core.step import SampledToken
from cluster.v1 import inference_pb2 as pb
from cluster.wire import LEDGER_KEY, finish_reason_from_proto, logprobs_from_proto


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts; ``cached_tokens`` are those of the prompt that the prefix cache served."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a request waits for.

    Attributes:
        stage: ``"queued"``, ``"warming"`` (for a replica to be ready) or ``"moving"`` (its replica was lost);
            ``"unspecified"`` from a newer server.
        position: queued: requests that go first, as things stand.
        eta_ms: until the stage ends; None where nobody knows.
    """

    stage: str
    position: int
    eta_ms: int | None


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where a request's time went, at the gateway that answered.

    Attributes:
        gateway_queue_ms: waiting for admission and for a replica.
        queue_ms: waiting in replicas.
        prefill_ms, decode_ms: until the first token, and from there on.
        preempted_ms, num_preemptions: out of the batch again, and how often.
        num_moves: how often it went on at another replica.
        cached_tokens: of the prompt.
        replicas: that served it, in order.
        exact: whether it has the tokens that it would have had without moves.
    """

    gateway_queue_ms: int
    queue_ms: int
    prefill_ms: int
    decode_ms: int
    preempted_ms: int
    num_preemptions: int
    num_moves: int
    cached_tokens: int
    replicas: tuple[str, ...]
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A delta of one candidate. Text and tokens may advance apart: text that could still become a stop string waits.

    Attributes:
        text, text_offset: the new text, and where it begins in the candidate's text, in code points.
        token_ids, token_offset: the new tokens, and where they begin in the candidate's tokens.
        logprobs: one per token of ``token_ids`` if asked for, else empty.
        seed: on the stream's first chunk, the seed in force; else None.
        finish_reason, usage: on the candidate's last chunk; else None.
        progress: what the request waits for, with nothing else in the chunk; only if asked for, else None.
    """

    generation_id: str
    sequence: int
    candidate_index: int
    text: str
    text_offset: int
    token_ids: tuple[int, ...]
    token_offset: int
    logprobs: tuple[SampledToken, ...]
    seed: int | None
    finish_reason: FinishReason | None
    usage: Usage | None
    progress: Progress | None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One completion; ``logprobs`` has one entry per token if asked for, else none."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[SampledToken, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """A finished generation. ``text`` and its fellows are those of the first candidate.

    Attributes:
        seed: the seed in force, drawn by the server where none was given; with it the same tokens come again.
        candidates: ``n`` of them, by index.
        usage: completion tokens of all candidates together.
        ledger: where the time went; None where the server did not say.
    """

    generation_id: str
    model: str
    seed: int
    candidates: tuple[Candidate, ...]
    usage: Usage
    ledger: Ledger | None

    @property
    def text(self) -> str:
        return self.candidates[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.candidates[0].token_ids

    @property
    def logprobs(self) -> tuple[SampledToken, ...]:
        return self.candidates[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.candidates[0].finish_reason


@dataclass(frozen=True, kw_only=True)
class ReplicaStatus:
    """A replica as its gateway sees it.

    Attributes:
        state: ``"connecting"``, ``"ready"``, ``"draining"`` or ``"ejected"``; ``"unspecified"`` from a newer server.
        running, waiting: sequences in the running batch, and queued in the replica; each candidate is one.
        outstanding_tokens: prompt and completion tokens still to do.
        kv_usage: share of the KV blocks in use, in [0, 1].
        group: zone, rack or accelerator class, as configured; or empty.
        fingerprint: short; equal for replicas between which a request moves exactly.
    """

    replica_id: str
    state: str
    address: str
    running: int
    waiting: int
    outstanding_tokens: int
    kv_capacity_tokens: int
    kv_usage: float
    device: str
    group: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """A served model; ``max_model_len`` counts prompt and completion together, in tokens."""

    name: str
    architecture: str
    max_model_len: int
    vocab_size: int
    dtype: str
    replicas: tuple[ReplicaStatus, ...]


def chunk_from_proto(message: pb.GenerateChunk) -> Chunk:
    return Chunk(
        generation_id=message.generation_id,
        sequence=message.sequence,
        candidate_index=message.candidate_index,
        text=message.text_delta,
        text_offset=message.text_offset,
        token_ids=tuple(message.token_ids),
        token_offset=message.token_offset,
        logprobs=tuple(logprobs_from_proto(message.logprobs)),
        seed=message.seed if message.HasField("seed") else None,
        finish_reason=finish_reason_from_proto(message.finish_reason),
        usage=_usage_from_proto(message.usage) if message.HasField("usage") else None,
        progress=_progress_from_proto(message.progress) if message.HasField("progress") else None,
    )


def _progress_from_proto(message: pb.Progress) -> Progress:
    return Progress(
        stage=_enum_name(pb.Progress.Stage, message.stage, "STAGE_"),
        position=message.position,
        eta_ms=message.eta_ms if message.HasField("eta_ms") else None,
    )


def ledger_from_trailer(metadata: Iterable[tuple[str, str | bytes]] | None) -> Ledger | None:
    """The ledger of an answer's trailing metadata, None where there is none."""
    packed = next((value for key, value in metadata or () if key == LEDGER_KEY), None)
    if packed is None:
        return None
    message = pb.Ledger.FromString(packed)
    values = {field.name: getattr(message, field.name) for field in pb.Ledger.DESCRIPTOR.fields}
    return Ledger(**values | {"replicas": tuple(message.replicas)})


def result_from_proto(message: pb.GenerateResponse, ledger: Ledger | None) -> GenerationResult:
    return GenerationResult(
        generation_id=message.generation_id,
        model=message.model,
        seed=message.seed,
        candidates=tuple(
            Candidate(
                index=candidate.index,
                text=candidate.text,
                token_ids=tuple(candidate.token_ids),
                logprobs=tuple(logprobs_from_proto(candidate.logprobs)),
                finish_reason=finish_reason_from_proto(candidate.finish_reason),
            )
            for candidate in sorted(message.candidates, key=lambda candidate: candidate.index)
        ),
        usage=_usage_from_proto(message.usage),
        ledger=ledger,
    )


def models_from_proto(messages: Iterable[pb.Model]) -> list[Model]:
    return [model_from_proto(message) for message in messages]


def model_from_proto(message: pb.Model) -> Model:
    return Model(
        name=message.name,
        architecture=message.architecture,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        dtype=message.dtype,
        replicas=tuple(_replica_from_proto(replica) for replica in message.replicas),
    )


def _usage_from_proto(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        completion_tokens=message.completion_tokens,
    )


def _replica_from_proto(message: pb.ReplicaStatus) -> ReplicaStatus:
    return ReplicaStatus(
        replica_id=message.replica_id,
        state=_enum_name(pb.ReplicaState, message.state, "REPLICA_STATE_"),
        address=message.address,
        running=message.running,
        waiting=message.waiting,
        outstanding_tokens=message.outstanding_tokens,
        kv_capacity_tokens=message.kv_capacity_tokens,
        kv_usage=message.kv_usage,
        device=message.device,
        group=message.group,
        fingerprint=message.fingerprint,
    )


def _enum_name(enum: Any, number: int, prefix: str) -> str:
    """A number of a newer server is ``"unspecified"``."""
    return enum.Name(number if number in enum.values() else 0).removeprefix(prefix).lower()
