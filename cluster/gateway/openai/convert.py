"""OpenAI's request bodies as requests of the one path."""

from __future__ import annotations

from typing import cast

from cluster.core.request import Priority
from cluster.errors import InvalidRequest
from cluster.gateway.openai.schema import ChatBody, CompletionBody, Message, SamplingBody
from cluster.gateway.sampling_fields import sampling_of
from cluster.v1 import inference_pb2
from cluster.wire import priority_to_proto

MAX_PROMPTS = 128
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for completions alone
_MAX_UINT32 = 2**32 - 1


def completion_requests(body: CompletionBody, *, request_id: str) -> list[inference_pb2.GenerateRequest]:
    """One request per prompt.

    Raises:
        InvalidRequest: a field can never be served.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of must equal n, or be left out: all candidates are returned", field="best_of")
    max_tokens = _DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    common = _request(body, max_tokens=max_tokens, logprobs=body.logprobs)
    prompts = _prompts(body.prompt)
    requests = []
    for index, prompt in enumerate(prompts):
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(common)
        # Each prompt is a request with a name of its own.
        request.request_id = f"{request_id}/{index}" if request_id and len(prompts) > 1 else request_id
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.token_ids.ids.extend(prompt)
        requests.append(request)
    return requests


def chat_request(body: ChatBody, *, request_id: str) -> inference_pb2.GenerateRequest:
    """The request of a chat.

    Raises:
        InvalidRequest: a field can never be served.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", field="top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    request = _request(body, max_tokens=max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    request.request_id = request_id
    request.session_id = body.session_id or body.prompt_cache_key or ""
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(body.messages)]
    request.chat.CopyFrom(inference_pb2.ChatMessages(messages=messages))
    return request


def _request(body: SamplingBody, *, max_tokens: int | None, logprobs: int | None) -> inference_pb2.GenerateRequest:
    """All but the input."""
    request = inference_pb2.GenerateRequest(
        model=body.model or "",
        sampling=sampling_of(body, max_tokens=max_tokens, logprobs=logprobs),
        priority=_priority(body.priority),
        cache_salt=body.cache_salt or "",
        session_id=body.session_id or "",
    )
    if body.max_ttft_ms is not None:
        if not 0 <= body.max_ttft_ms <= _MAX_UINT32:
            raise InvalidRequest(f"max_ttft_ms must be in [0, {_MAX_UINT32}]", field="max_ttft_ms")
        request.max_ttft_ms = body.max_ttft_ms
    return request


def _priority(value: int | str | None) -> inference_pb2.Priority:
    if value is None:
        return inference_pb2.PRIORITY_UNSPECIFIED
    try:
        return priority_to_proto(Priority[value.upper()] if isinstance(value, str) else Priority(value))
    except (KeyError, ValueError):
        raise InvalidRequest(
            f"{value!r} is no priority; there is {', '.join(Priority.__members__)}, or 0 to {max(Priority)}",
            field="priority",
        ) from None


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """A text, a list of them, token ids, or a list of such lists, always as a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("the prompt is empty", field="prompt")
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise InvalidRequest("prompt mixes texts and token ids: send one kind", field="prompt")
    prompts = cast("list[str | list[int]]", [prompt] if kinds == {int} else prompt)
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(
            f"{len(prompts)} prompts in one request; at most {MAX_PROMPTS} are allowed", field="prompt"
        )
    for token_ids in prompts:
        if not isinstance(token_ids, str) and any(not 0 <= token_id <= _MAX_UINT32 for token_id in token_ids):
            raise InvalidRequest("token ids must not be negative, nor beyond any vocabulary", field="prompt")
    return prompts


def _message(message: Message, field: str) -> inference_pb2.ChatMessage:
    for name in ("audio", "function_call", "tool_calls"):
        if getattr(message, name):
            raise InvalidRequest(f"{name} in messages is not served here", field=f"{field}.{name}")
    if message.content is None:
        raise InvalidRequest("the message has no content", field=f"{field}.content")
    parts = []
    if isinstance(message.content, str):
        parts.append(inference_pb2.ContentPart(text=message.content))
    else:
        for index, part in enumerate(message.content):
            if part.type == "text" and part.text is not None:
                parts.append(inference_pb2.ContentPart(text=part.text))
            elif part.type == "image_url":
                parts.append(inference_pb2.ContentPart(image=inference_pb2.ImagePart()))  # the path says what of it
            else:
                raise InvalidRequest("the part must be a text", field=f"{field}.content[{index}]")
    # OpenAI's newer name of the role.
    role = "system" if message.role == "developer" else message.role
    return inference_pb2.ChatMessage(role=role, content=parts)
