"""What client, gateway and replica agree on: names on the wire, and messages to and from ``core``'s dataclasses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.core.request import FinishReason, Priority, SamplingParams
from cluster.core.step import SampledToken
from cluster.v1 import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name  # the gateway's health goes by it, too
ERROR_DOMAIN = "cluster.v1"  # of ErrorInfo; other domains' reasons are not ours
PROTOCOL_VERSION = 2  # of the stream between gateway and replica
SECRET_KEY = "cluster-secret"  # metadata of that stream
LEDGER_KEY = "cluster-ledger-bin"  # trailing metadata of an answer: a Ledger

_PRIORITY_TO_PROTO = {
    Priority.P0: pb.PRIORITY_P0,
    Priority.P1: pb.PRIORITY_P1,
    Priority.P2: pb.PRIORITY_P2,
    Priority.P3: pb.PRIORITY_P3,
}
_PRIORITY_FROM_PROTO = {value: key for key, value in _PRIORITY_TO_PROTO.items()}
_FINISH_TO_PROTO = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}
_FINISH_FROM_PROTO = {value: key for key, value in _FINISH_TO_PROTO.items()}
_SCALARS = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logprobs", "ignore_eos", "n",
)  # fmt: skip


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """Every scalar that is set is written out, defaults included."""
    return pb.SamplingParams(
        **{name: value for name in _SCALARS if (value := getattr(params, name)) is not None},
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        logit_bias=params.logit_bias,
    )


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """Unset fields take SamplingParams' defaults.

    Raises:
        InvalidRequest: a value is out of range; the error names the field.
    """
    return SamplingParams(
        **{name: getattr(message, name) for name in _SCALARS if message.HasField(name)},
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias),
    )


def priority_to_proto(priority: Priority) -> pb.Priority:
    return _PRIORITY_TO_PROTO[priority]


def priority_from_proto(value: pb.Priority) -> Priority | None:
    """The class, ``P1`` where unspecified, None for a number that is no class."""
    return Priority.P1 if value == pb.PRIORITY_UNSPECIFIED else _PRIORITY_FROM_PROTO.get(value)


def finish_reason_to_proto(reason: FinishReason | None) -> pb.FinishReason:
    return pb.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_TO_PROTO[reason]


def finish_reason_from_proto(value: pb.FinishReason) -> FinishReason | None:
    return _FINISH_FROM_PROTO.get(value)


def logprobs_to_proto(tokens: Iterable[SampledToken]) -> list[pb.PositionLogprobs]:
    return [
        pb.PositionLogprobs(
            chosen=pb.TokenLogprob(token_id=token.token_id, logprob=token.logprob or 0.0),
            top=[pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top_logprobs],
        )
        for token in tokens
    ]


def logprobs_from_proto(positions: Iterable[pb.PositionLogprobs]) -> list[SampledToken]:
    return [
        SampledToken(
            token_id=position.chosen.token_id,
            logprob=position.chosen.logprob,
            top_logprobs=tuple((top.token_id, top.logprob) for top in position.top),
        )
        for position in positions
    ]


def chat_to_proto(messages: Sequence[dict[str, str]]) -> pb.ChatMessages:
    """``[{"role": ..., "content": ...}]`` as chat messages with one text part each."""
    return pb.ChatMessages(
        messages=[
            pb.ChatMessage(role=message["role"], content=[pb.ContentPart(text=message["content"])])
            for message in messages
        ]
    )
