"""The input of a request as token ids. Whatever is wrong with it is said before the tokenizer sees it."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import InvalidRequest, Unsupported
from cluster.text.tokenizer import Tokenizer
from cluster.v1 import inference_pb2

_ROLES = ("system", "user", "assistant")


async def tokenize(
    request: inference_pb2.GenerateRequest | inference_pb2.CountTokensRequest,
    tokenizer: Tokenizer,
    *,
    max_prompt_bytes: int,
) -> Sequence[int]:
    """Token ids of a prompt or a chat, special tokens and chat template included; given token ids as they are.

    Raises:
        InvalidRequest: no input, an empty or too large one, or a chat that the model cannot take.
        Unsupported: an image.
    """
    kind = request.WhichOneof("input")
    if kind == "prompt":
        _check_size(len(request.prompt.encode()), max_prompt_bytes, "prompt")
        if not request.prompt:
            raise InvalidRequest("the prompt is empty", field="prompt")
        token_ids = await tokenizer.encode_async(request.prompt)
    elif kind == "chat":
        messages = _chat_messages(request.chat)
        _check_size(sum(len(message["content"].encode()) for message in messages), max_prompt_bytes, "chat")
        token_ids = await tokenizer.encode_chat_async(messages)
    elif kind == "token_ids":
        token_ids = request.token_ids.ids
    else:
        raise InvalidRequest("the request has no input: set one of prompt, token_ids and chat", field="input")
    if not token_ids:
        raise InvalidRequest("the input has no tokens", field=kind)
    return token_ids


def input_size(request: inference_pb2.GenerateRequest, *, max_prompt_bytes: int) -> tuple[int, int | None]:
    """How much there is to tokenize: bytes of text, and the number of tokens where they are given.

    Raises:
        InvalidRequest: it is too large.
    """
    kind = request.WhichOneof("input")
    if kind == "token_ids":
        return 0, len(request.token_ids.ids)
    if kind == "chat":
        num_bytes = sum(len(part.text.encode()) for message in request.chat.messages for part in message.content)
    else:
        num_bytes = len(request.prompt.encode())
    _check_size(num_bytes, max_prompt_bytes, kind or "input")
    return num_bytes, None


def check_tokens(token_ids: Sequence[int], *, field: str, max_model_len: int, vocab_size: int) -> None:
    """Raises InvalidRequest where the model cannot take these ids; ``field`` is where in the request they came from."""
    if len(token_ids) >= max_model_len:
        raise InvalidRequest(
            f"the input has {len(token_ids)} tokens; the model's context holds {max_model_len}, and at least one must "
            f"be left for the completion",
            field=field,
        )
    if max(token_ids) >= vocab_size:
        index = next(index for index, token_id in enumerate(token_ids) if token_id >= vocab_size)
        raise InvalidRequest(
            f"token {token_ids[index]} is not in the model's vocabulary of {vocab_size} tokens",
            field=f"token_ids.ids[{index}]",
        )


def _check_size(num_bytes: int, limit: int, field: str) -> None:
    if num_bytes > limit:
        raise InvalidRequest(f"the {field} has {num_bytes} bytes; at most {limit} are allowed", field=field)


def _chat_messages(chat: inference_pb2.ChatMessages) -> list[dict[str, str]]:
    if not chat.messages:
        raise InvalidRequest("the chat has no messages", field="chat.messages")
    messages = []
    for index, message in enumerate(chat.messages):
        field = f"chat.messages[{index}]"
        if message.role not in _ROLES:
            raise InvalidRequest(f"the role must be one of {', '.join(_ROLES)}", field=f"{field}.role")
        for part_index, part in enumerate(message.content):
            kind = part.WhichOneof("part")
            if kind == "image":
                raise Unsupported("images are not served yet; send text", field=f"{field}.content[{part_index}]")
            if kind is None:
                raise InvalidRequest("the part is empty: set text", field=f"{field}.content[{part_index}]")
        messages.append({"role": message.role, "content": "".join(part.text for part in message.content)})
    return messages
