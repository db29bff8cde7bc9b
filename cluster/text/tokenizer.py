"""Text to token ids and back, from a Hugging Face directory's ``tokenizer.json``; neither torch nor transformers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import tokenizers

from cluster.errors import CheckpointError, InvalidRequest
from cluster.text.chat_template import ChatTemplate

# Up to 200 us: tokenizing takes 0.2 us per ASCII character, 0.6 us per emoji. Longer texts leave the event loop.
_MAX_INLINE_CHARS = 1024
_MAX_INLINE_CHARS_NOT_ASCII = 256
_TOKEN_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


class Tokenizer:
    """A model's tokenizer. Thread-safe.

    Attributes:
        backend: the ``tokenizers`` object.
        special_token_ids: ids that have no text.
        vocab_size: the model's: ids below it are valid, whether or not they have a text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int,
        chat_template: ChatTemplate | None,
    ) -> None:
        self.backend = backend
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size = vocab_size
        self._chat_template = chat_template

    @classmethod
    def from_checkpoint(cls, directory: Path) -> Tokenizer:
        """Reads ``tokenizer.json``, and from the other files special tokens, vocabulary size and chat template.

        Which special tokens begin or end an encoded text is tokenizer.json's to say, as in transformers 5.

        Raises:
            CheckpointError: a file is missing or broken; the message names it.
        """
        backend = _load_backend(directory / "tokenizer.json")
        settings = _read_json(directory / "tokenizer_config.json", required=False)
        try:
            _add_tokens(backend, settings)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            file = directory / "tokenizer_config.json"
            raise CheckpointError(f"{file}: the special or added tokens are not as expected: {error!r}") from error
        config = _read_json(directory / "config.json", required=True)
        vocab_size = (config.get("text_config") or config).get("vocab_size")
        if not isinstance(vocab_size, int) or vocab_size < 1:
            raise CheckpointError(f"{directory / 'config.json'}: vocab_size is {vocab_size!r}, not a positive number")
        return cls(
            backend,
            vocab_size=vocab_size,
            chat_template=ChatTemplate.from_checkpoint(directory, settings),
        )

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids.

        Raises:
            InvalidRequest: the text is empty, or has a NUL or a lone surrogate.
        """
        return self._encode(text, add_special_tokens=add_special_tokens, field="prompt")

    async def encode_async(self, text: str) -> list[int]:
        """As ``encode``; a long text is tokenized in a thread, which does not hold the interpreter's lock."""
        if _is_short(text):
            return self.encode(text)
        return await asyncio.to_thread(self.encode, text)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a chat up to where the assistant's next message begins.

        Raises:
            InvalidRequest: the model has no chat template, its template refuses these messages, or what comes of them
                cannot be encoded.
        """
        if self._chat_template is None:
            raise InvalidRequest("this model has no chat template; send a prompt", field="chat")
        return self._encode(self._chat_template.render(messages), add_special_tokens=False, field="chat")

    async def encode_chat_async(self, messages: list[dict[str, str]]) -> list[int]:
        if _is_short("".join(message["content"] for message in messages)):
            return self.encode_chat(messages)
        return await asyncio.to_thread(self.encode_chat, messages)

    def _encode(self, text: str, *, add_special_tokens: bool, field: str) -> list[int]:
        _check_text(text, field)
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text


def _is_short(text: str) -> bool:
    return len(text) <= (_MAX_INLINE_CHARS if text.isascii() else _MAX_INLINE_CHARS_NOT_ASCII)


def _check_text(text: str, field: str) -> None:
    if not text:
        raise InvalidRequest("the text is empty", field=field)
    if "\0" in text:
        raise InvalidRequest("the text holds a NUL character", field=field)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the text is not valid Unicode at character {error.start}", field=field) from None


def _load_backend(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing. Where there is only a SentencePiece tokenizer.model, convert it once: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes tokenizer.json"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    # Left over from training in some files; a prompt that is too long must be refused, not cut.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(file: Path, *, required: bool) -> dict[str, Any]:
    if not file.is_file() and not required:
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return value


def _add_tokens(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Adds tokens that only tokenizer_config.json has, and makes special what it calls so, as transformers does."""
    listed = settings.get("added_tokens_decoder") or {}
    for token_id in sorted(listed, key=int):
        flags = {flag: bool(listed[token_id].get(flag)) for flag in _TOKEN_FLAGS}
        add = backend.add_special_tokens if flags["special"] else backend.add_tokens
        add([tokenizers.AddedToken(listed[token_id]["content"], **flags)])
    added = backend.get_added_tokens_decoder().values()
    texts = {_token_text(value) for key, value in settings.items() if key.endswith("_token")}
    texts -= {token.content for token in added if token.special}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or ()
        more_texts = {_token_text(value) for value in (more.values() if isinstance(more, dict) else more)}
        texts |= more_texts - {token.content for token in added}
    backend.add_special_tokens(
        [tokenizers.AddedToken(text, special=True, normalized=False) for text in sorted(filter(None, texts))]
    )


def _token_text(value: object) -> str | None:
    """A special token is written as its text, or as an object with its ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
