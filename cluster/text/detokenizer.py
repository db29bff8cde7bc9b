"""Token ids to text, one at a time: no piece is given out before it is certain."""

from __future__ import annotations

import codecs
from functools import lru_cache
from typing import Protocol

from tokenizers import decoders

from cluster.text.tokenizer import Tokenizer


class Detokenizer(Protocol):
    """Turns a growing list of tokens into a growing text.

    The pieces put together equal ``Tokenizer.decode`` of all the tokens, special ones skipped.
    """

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; empty while a character is incomplete."""

    def finish(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD, as in ``decode``."""


def create_detokenizer(tokenizer: Tokenizer) -> Detokenizer:
    """The fast one for byte-level BPE, else the general one."""
    if isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
        return ByteLevelDetokenizer(_vocabulary(tokenizer))
    return WindowDetokenizer(tokenizer)


class ByteLevelVocabulary:
    """The bytes of each token of a byte-level BPE, looked up once per token id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._special = tokenizer.special_token_ids
        self._bytes: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        value = self._bytes.get(token_id)
        if value is None:
            value = self._bytes[token_id] = self._look_up(token_id)
        return value

    def _look_up(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._backend.id_to_token(token_id)
        if token is None:
            return b""
        alphabet = _byte_alphabet()
        if all(char in alphabet for char in token):
            return bytes(alphabet[char] for char in token)
        return token.encode()  # an added token is written as it is


class ByteLevelDetokenizer:
    """For byte-level BPE: tokens are bytes, and an incremental UTF-8 decoder knows when a character is complete."""

    __slots__ = ("_decode", "_vocabulary")

    def __init__(self, vocabulary: ByteLevelVocabulary) -> None:
        self._vocabulary = vocabulary
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def push(self, token_id: int) -> str:
        return self._decode(self._vocabulary[token_id])

    def finish(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For every other decoder: decodes a short window of tokens with and without the new one.

    The window starts a few tokens back because what a token looks like may depend on the one before it (a leading
    space). Text that ends in U+FFFD is held, as the character may be incomplete. A run of byte tokens that is no valid
    UTF-8 may come out with fewer or more replacement characters than in ``decode``, which judges the run as a whole.
    """

    _MAX_HELD_TOKENS = 8  # a character has at most four bytes

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_read = 0  # tokens of the window whose text is out
        self._read_text = ""

    def push(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_token_ids:
            return ""  # decode drops it before it looks at its neighbours
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith("\ufffd") and len(self._window) - self._num_read < self._MAX_HELD_TOKENS:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        return self._advance(self._tokenizer.decode(self._window)) if self._num_read < len(self._window) else ""

    def _advance(self, text: str) -> str:
        piece = text[len(self._read_text) :]
        if piece:  # a token without text must stay in the window's tail, or what follows would lose its context
            del self._window[: self._num_read]
            self._read_text = self._tokenizer.decode(self._window)
        self._num_read = len(self._window)
        return piece


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


@lru_cache(maxsize=16)
def _vocabulary(tokenizer: Tokenizer) -> ByteLevelVocabulary:
    return ByteLevelVocabulary(tokenizer)
