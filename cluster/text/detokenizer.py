"""Token ids to text, one at a time: no piece is given out before it is certain."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import tokenizers
from tokenizers import decoders

from cluster.text.tokenizer import Tokenizer


class Detokenizer(Protocol):
    """Turns a growing list of tokens into a growing text.

    The pieces put together equal ``Tokenizer.decode`` of all the tokens, special ones skipped. The one exception is
    invalid UTF-8 from a model with byte fallback: see ByteFallbackDetokenizer.
    """

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; empty while a character is incomplete."""

    def push_all(self, token_ids: Sequence[int]) -> str:
        """As ``push`` of one after the other."""

    def finish(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD, as in ``decode``."""


def create_detokenizer(tokenizer: Tokenizer) -> Detokenizer:
    """The fast ones for byte-level BPE and for SentencePiece with byte fallback, else the general one."""
    vocabulary = vocabulary_of(tokenizer)
    if isinstance(vocabulary, ByteLevelVocabulary):
        return ByteLevelDetokenizer(vocabulary)
    if isinstance(vocabulary, ByteFallbackVocabulary):
        return ByteFallbackDetokenizer(vocabulary)
    return WindowDetokenizer(tokenizer)


class ByteLevelVocabulary:
    """The bytes of each token of a byte-level BPE, looked up once per token id."""

    def __init__(self, backend: tokenizers.Tokenizer, special_token_ids: frozenset[int]) -> None:
        self._backend = backend
        self._special = special_token_ids
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

    def push_all(self, token_ids: Sequence[int]) -> str:
        vocabulary = self._vocabulary
        return self._decode(b"".join([vocabulary[token_id] for token_id in token_ids]))

    def finish(self) -> str:
        return self._decode(b"", True)


class ByteFallbackVocabulary:
    """What each token of a SentencePiece vocabulary stands for, looked up once per token id.

    Attributes:
        num_stripped: spaces that are dropped at the beginning of a text, where they are there.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_token_ids: frozenset[int],
        replacements: list[tuple[str, str]],
        num_stripped: int,
    ) -> None:
        self.num_stripped = num_stripped
        self._backend = backend
        self._special = special_token_ids
        self._replacements = replacements
        self._pieces: dict[int, str | bytes | None] = {}

    def __getitem__(self, token_id: int) -> str | bytes | None:
        """A text, a byte, or None for a token that ``decode`` skips."""
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._pieces[token_id] = self._look_up(token_id)
            return piece

    def _look_up(self, token_id: int) -> str | bytes | None:
        token = None if token_id in self._special else self._backend.id_to_token(token_id)
        if token is None:
            return None
        for old, new in self._replacements:
            token = token.replace(old, new)
        return bytes.fromhex(token[3:5]) if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token) else token


class ByteFallbackDetokenizer:
    """For SentencePiece vocabularies, where characters without a token are runs of byte tokens.

    A byte run that is valid UTF-8 up to some place is given out up to there. ``decode`` judges a run as a whole: one
    wrong byte turns all of it into U+FFFD. Following it would hold every run, thus every line feed of Llama 2, until
    the token after it, and find stop strings one token late. So characters before (and after) a wrong byte stay.
    """

    __slots__ = ("_decode", "_num_strippable", "_vocabulary")

    def __init__(self, vocabulary: ByteFallbackVocabulary) -> None:
        self._vocabulary = vocabulary
        self._decode = codecs.getincrementaldecoder("utf-8")(errors=_REPLACE_EACH_BYTE).decode
        self._num_strippable = vocabulary.num_stripped

    def push(self, token_id: int) -> str:
        piece = self._vocabulary[token_id]
        if piece is None:
            return ""
        text = self._decode(piece) if isinstance(piece, bytes) else self._decode(b"", True) + piece
        return self._strip(text) if self._num_strippable else text

    def push_all(self, token_ids: Sequence[int]) -> str:
        return "".join([self.push(token_id) for token_id in token_ids])

    def finish(self) -> str:
        return self._decode(b"", True)

    def _strip(self, text: str) -> str:
        while text and self._num_strippable:
            if text[0] != " ":
                self._num_strippable = 0
                break
            text = text[1:]
            self._num_strippable -= 1
        return text


class WindowDetokenizer:
    """For every other decoder: decodes a short window of tokens with and without the new one.

    The window starts a few tokens back because what a token looks like may depend on the one before it (a leading
    space). Text that ends in U+FFFD is held, as the character may be incomplete.
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

    def push_all(self, token_ids: Sequence[int]) -> str:
        return "".join([self.push(token_id) for token_id in token_ids])

    def finish(self) -> str:
        return self._advance(self._tokenizer.decode(self._window)) if self._num_read < len(self._window) else ""

    def _advance(self, text: str) -> str:
        piece = text[len(self._read_text) :]
        if piece:  # a token without text must stay in the window's tail, or what follows would lose its context
            del self._window[: self._num_read]
            self._read_text = self._tokenizer.decode(self._window)
        self._num_read = len(self._window)
        return piece


# One per tokenizer, for as long as it lives: the tables in them are shared by all its streams.
_vocabularies: WeakKeyDictionary[Tokenizer, ByteLevelVocabulary | ByteFallbackVocabulary | None] = WeakKeyDictionary()


def vocabulary_of(tokenizer: Tokenizer) -> ByteLevelVocabulary | ByteFallbackVocabulary | None:
    """The table for the tokenizer's decoder; None for one that only its own library understands."""
    vocabulary = _vocabularies.get(tokenizer)
    if vocabulary is None:
        vocabulary = _vocabularies[tokenizer] = _vocabulary(tokenizer)
    return vocabulary


def _vocabulary(tokenizer: Tokenizer) -> ByteLevelVocabulary | ByteFallbackVocabulary | None:
    backend, special = tokenizer.backend, tokenizer.special_token_ids
    if isinstance(backend.decoder, decoders.ByteLevel):
        return ByteLevelVocabulary(backend, special)
    if isinstance(backend.decoder, decoders.Sequence):
        return _byte_fallback_vocabulary(backend, special)
    return None


def _byte_fallback_vocabulary(
    backend: tokenizers.Tokenizer, special_token_ids: frozenset[int]
) -> ByteFallbackVocabulary | None:
    """Where the decoder is Replace, ..., ByteFallback, Fuse, and at most one Strip of leading spaces."""
    steps: list[dict[str, Any]] = json.loads(backend.decoder.__getstate__())["decoders"]
    names = [step["type"] for step in steps]
    if not re.fullmatch("(Replace )*ByteFallback Fuse( Strip)?", " ".join(names)):
        return None
    replacements = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
    strip: dict[str, Any] = steps[-1] if names[-1] == "Strip" else {"content": " ", "start": 0, "stop": 0}
    if strip["content"] != " " or strip["stop"] or any(old is None for old, _ in replacements):
        return None
    return ByteFallbackVocabulary(backend, special_token_ids, replacements, strip["start"])


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


# Python's own "replace" writes one U+FFFD for the bytes of a cut-off character, byte fallback one for each of them.
_REPLACE_EACH_BYTE = "cluster.replace_each_byte"
codecs.register_error(_REPLACE_EACH_BYTE, _replace_each_byte)
