"""A call's arguments as a message, checked before anything is sent."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypedDict

from cluster.core.request import Priority, SamplingParams
from cluster.errors import InvalidRequest
from cluster.v1 import inference_pb2 as pb
from cluster.wire import chat_to_proto, priority_to_proto, sampling_to_proto

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]

_MAX_TOKEN_ID = 2**32 - 1


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of the generating methods.

    model: may be left out where the server has one model.
    priority: the request's class, by default P1.
    deadline_s: seconds for the whole call, retries included; by default the client's own.
    request_id: the caller's name for the call, by which ``cancel`` finds it; drawn if left out. The same name again
        with the same request joins the call, or has its answer again.
    labels: free, for accounting; at most 16.
    cache_salt: only calls with the same salt share cached prompts; at most 256 bytes.
    max_ttft_ms: be refused at once (Overloaded) if the first token is predicted to come later than this.
    progress: for streams: have chunks that tell of the queue, of warming, of moves, while there is nothing else.
    session_id: calls of one session go to one replica under that balancing policy.

    The rest are fields of SamplingParams. They override those of a SamplingParams passed along.
    """

    model: str
    priority: Priority
    deadline_s: float
    request_id: str
    labels: Mapping[str, str]
    cache_salt: str
    max_ttft_ms: int
    progress: bool
    session_id: str

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int | None
    min_tokens: int
    stop: str | Iterable[str]
    stop_token_ids: Iterable[int]
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logprobs: int | None
    logit_bias: Mapping[int, float]
    ignore_eos: bool
    n: int


_SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))


def prompt_request(prompt: Prompt, sampling: SamplingParams | None, options: GenerateOptions) -> pb.GenerateRequest:
    """A request to continue a text or token ids.

    Raises:
        InvalidRequest: a value can never be right; the error names the field.
        TypeError: no such keyword argument.
    """
    request = _request(sampling, options)
    if isinstance(prompt, str):
        request.prompt = _encodable(prompt, "prompt")
    else:
        request.token_ids.ids.extend(_checked_ids(prompt))
        request.token_ids.SetInParent()  # so that an empty list is refused by name, as an empty prompt is
    return request


def chat_request(messages: Messages, sampling: SamplingParams | None, options: GenerateOptions) -> pb.GenerateRequest:
    """A request to answer a conversation; raises as ``prompt_request`` does."""
    request = _request(sampling, options)
    request.chat.CopyFrom(_chat(messages))
    return request


def count_request(prompt: str | None, messages: Messages | None, model: str) -> pb.CountTokensRequest:
    """A request to count the tokens of a prompt or of a conversation, exactly one of which is given."""
    if (prompt is None) == (messages is None):
        raise TypeError("count_tokens takes either a prompt or messages")
    if messages is not None:
        return pb.CountTokensRequest(model=model, chat=_chat(messages))
    if not isinstance(prompt, str):
        raise InvalidRequest(f"the prompt must be a string, not {type(prompt).__name__}", field="prompt")
    return pb.CountTokensRequest(model=model, prompt=_encodable(prompt, "prompt"))


def draw_name() -> str:
    """A request id that nobody else has."""
    return f"req-{secrets.token_hex(12)}"


def _request(sampling: SamplingParams | None, options: GenerateOptions) -> pb.GenerateRequest:
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")
    overrides: dict[str, Any] = {name: value for name, value in options.items() if name in _SAMPLING_FIELDS}
    return pb.GenerateRequest(
        model=options.get("model", ""),
        request_id=options.get("request_id") or draw_name(),
        sampling=sampling_to_proto(replace(sampling or SamplingParams(), **overrides)),
        priority=priority_to_proto(Priority(options.get("priority", Priority.P1))),
        labels=options.get("labels"),
        cache_salt=_encodable(options.get("cache_salt", ""), "cache_salt"),
        max_ttft_ms=_checked_limit(options.get("max_ttft_ms"), "max_ttft_ms"),
        progress=options.get("progress", False),
        session_id=_encodable(options.get("session_id", ""), "session_id"),
    )


def _chat(messages: Messages) -> pb.ChatMessages:
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise InvalidRequest(
                    f"message {index} must be a mapping with the strings 'role' and 'content'",
                    field=f"chat.messages[{index}].{key}",
                )
            _encodable(message[key], f"chat.messages[{index}].{key}")
    return chat_to_proto(messages)


def _checked_ids(token_ids: Sequence[int]) -> Sequence[int]:
    for index, token_id in enumerate(token_ids):
        if isinstance(token_id, str):
            raise InvalidRequest("one call takes one prompt, not a list of texts", field="prompt")
        if not 0 <= token_id <= _MAX_TOKEN_ID:
            raise InvalidRequest(f"token_ids[{index}] is {token_id}, which is no token id", field="token_ids")
    return token_ids


def _encodable(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{field} is no valid Unicode text: {error}", field=field) from None
    return text


def _checked_limit(value: int | None, field: str) -> int | None:
    if value is not None and not 0 < value < 2**32:
        raise InvalidRequest(f"{field} is {value}; it must be a positive number of milliseconds", field=field)
    return value
