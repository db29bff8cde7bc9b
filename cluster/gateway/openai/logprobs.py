"""Log probabilities in the two shapes that OpenAI's API has for them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from cluster.text.token_bytes import token_bytes
from cluster.text.tokenizer import Tokenizer
from cluster.v1.inference_pb2 import PositionLogprobs, TokenLogprob


class ChatLogprobs:
    """Of one candidate of a chat. A part of a character is written as ``\\xNN``; its bytes are told beside it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def write(self, positions: Iterable[PositionLogprobs]) -> dict[str, Any]:
        content = [
            self._token(position.chosen) | {"top_logprobs": [self._token(top) for top in position.top]}
            for position in positions
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: TokenLogprob) -> dict[str, Any]:
        data = token_bytes(self._tokenizer, token.token_id)
        return {"token": data.decode(errors="backslashreplace"), "logprob": token.logprob, "bytes": list(data)}


class CompletionLogprobs:
    """Of one candidate of a completion. Offsets are code points in its text, a part of a character has ``bytes:``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._offset = 0

    def write(self, positions: Iterable[PositionLogprobs]) -> dict[str, Any]:
        tokens, logprobs, tops, offsets = [], [], [], []
        for position in positions:
            tokens.append(self._text(position.chosen))
            logprobs.append(position.chosen.logprob)
            tops.append({self._text(top): top.logprob for top in position.top})
            offsets.append(self._offset)
            self._offset += len(self._decode(token_bytes(self._tokenizer, position.chosen.token_id)))
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _text(self, token: TokenLogprob) -> str:
        data = token_bytes(self._tokenizer, token.token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
