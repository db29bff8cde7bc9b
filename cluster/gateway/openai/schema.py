"""Bodies of requests as OpenAI's API has them."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from cluster.errors import InvalidRequest, Unsupported
from cluster.gateway.sampling_fields import SamplingFields, validation_field

_Body = TypeVar("_Body", bound="SamplingBody")

# Known, not served, and changing what comes out: only values that ask for nothing are let through.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "echo": (None, False),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "service_tier": (None, "auto", "default"),
}


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False


class SamplingBody(SamplingFields, kw_only=True):
    """What completions and chats have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Not OpenAI's own.
    priority: int | str | None = None
    cache_salt: str | None = None
    max_ttft_ms: int | None = None
    session_id: str | None = None
    # For the client's own accounting: nothing depends on them here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    service_tier: Any = None


class CompletionBody(SamplingBody, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Any = None
    echo: Any = None


class ContentPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: str
    text: str | None = None
    image_url: Any = None


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message; one of the model's own answers may come back as it was, with its empty fields."""

    role: str
    content: str | list[ContentPart] | None = None
    name: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None


class ChatBody(SamplingBody, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    prompt_cache_key: str | None = None  # keeps what is alike together: a session


def parse_body(data: bytes, kind: type[_Body]) -> _Body:
    """The body of a request.

    Raises:
        InvalidRequest: it is no JSON, or not of this shape.
        Unsupported: it asks for something that is not served.
    """
    try:
        body = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the body is not as expected: {error}", field=validation_field(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    for name, allowed in _NEUTRAL.items():
        if getattr(body, name, None) not in allowed:
            raise Unsupported(f"{name} is not served here; leave it out", field=name)
    return body
