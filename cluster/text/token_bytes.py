"""One token shown alone, as log probabilities list it."""

from __future__ import annotations

from cluster.text.detokenizer import ByteFallbackVocabulary, ByteLevelVocabulary, vocabulary_of
from cluster.text.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes that the token stands for: perhaps a part of a character. A special token is written by its name."""
    if token_id in tokenizer.special_token_ids:
        return (tokenizer.backend.id_to_token(token_id) or "").encode()
    vocabulary = vocabulary_of(tokenizer)
    if isinstance(vocabulary, ByteLevelVocabulary):
        return vocabulary[token_id]
    if isinstance(vocabulary, ByteFallbackVocabulary):
        piece = vocabulary[token_id] or b""
        return piece.encode() if isinstance(piece, str) else piece
    return tokenizer.decode([token_id], skip_special_tokens=False).encode()
