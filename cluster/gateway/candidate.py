"""One candidate of a generation: all that it has so far."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

from cluster.core.request import FinishReason
from cluster.errors import InvalidRequest
from cluster.text.text_stream import TextStream
from cluster.v1 import inference_pb2, replica_pb2
from cluster.wire import finish_reason_to_proto

_STOP = finish_reason_to_proto(FinishReason.STOP)
_LENGTH = finish_reason_to_proto(FinishReason.LENGTH)


class Candidate:
    """Takes token deltas in, keeps the tokens and their text, and knows when it is complete.

    It keeps everything: work goes on elsewhere from its tokens, and readers come to it at any place.

    Attributes:
        token_ids: so far, in order; the one at which the replica stopped included.
        logprobs: one per token, where they were asked for.
        finish_reason: of the proto's FinishReason; 0 while more may come.
        cached_tokens: of the prompt, those served from the prefix cache where it began.
        first_token_s, last_token_s: when the first delta came and when the last, in monotonic seconds; None before.
        resumed_tokens, resumed_chars, resumed_end: what the client had of it before this gateway began, and whether it
            had its end; no reader gets that again.
    """

    __slots__ = (
        "_continued", "_num_chars", "_plain", "_text", "_text_end", "_text_stream", "cached_tokens", "finish_reason",
        "first_token_s", "index", "last_token_s", "logprobs", "resumed_chars", "resumed_end", "resumed_tokens",
        "token_ids",
    )  # fmt: skip

    def __init__(self, index: int, text_stream: TextStream) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[inference_pb2.PositionLogprobs] = []
        self.finish_reason = 0
        self._num_chars = 0
        self._text_end = 0  # of the tokens whose text has been made
        self._plain = False  # the next delta brings nothing but tokens
        self.cached_tokens = 0
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.resumed_tokens = 0
        self.resumed_chars = 0
        self.resumed_end = False
        self._text = StringIO()
        self._text_stream = text_stream
        self._continued = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        """That it takes in memory, about."""
        num_bytes = 1024 + 36 * len(self.token_ids) + 4 * self._num_chars
        if self.logprobs:
            num_bytes += len(self.logprobs) * 100 * (2 + len(self.logprobs[0].top))
        return num_bytes

    def push(self, delta: replica_pb2.TokenDelta) -> None:
        """Takes a delta in. A stop string ends the candidate even where the replica has not: see ``finish_reason``."""
        finish_reason = delta.finish_reason
        if not self._plain or finish_reason:
            self._push_whole(delta, finish_reason)
        else:
            # All that most deltas hold; their text is made when it is read. A list is taken in faster than a field.
            self.token_ids.extend(delta.token_ids[:])

    def _push_whole(self, delta: replica_pb2.TokenDelta, finish_reason: int) -> None:
        if delta.cached_tokens and not self._continued:
            self.cached_tokens = delta.cached_tokens
        num_before = len(self.token_ids)
        self.token_ids.extend(delta.token_ids)
        if finish_reason or self._text_stream.may_stop:
            # The token at which the replica stopped is reported, but it is no text.
            text_end = len(self.token_ids) - (finish_reason == _STOP)
            num_tokens = self._make_text(text_end)
            if num_tokens is not None:
                finish_reason = _STOP
                del self.token_ids[num_tokens:]
            elif finish_reason:
                self._write(self._text_stream.finish().text)
        if delta.logprobs:
            self.logprobs.extend(delta.logprobs[: len(self.token_ids) - num_before])
        self._plain = not self.logprobs and not self._text_stream.may_stop
        self.finish_reason = finish_reason

    def _make_text(self, end: int) -> int | None:
        """The text of the tokens up to ``end``; where a stop string ends it, the number of tokens up to there."""
        start, self._text_end = self._text_end, end
        text = self._text_stream.push(self.token_ids[start:end])
        self._write(text.text)
        return start + text.num_tokens if text.stopped else None

    def _write(self, text: str) -> None:
        self._text.write(text)
        self._num_chars += len(text)

    def resume(self, token_ids: Sequence[int], finish_reason: int, *, max_tokens: int) -> None:
        """Begins after what a client has had of it; on a new candidate only.

        Args:
            finish_reason: where it is complete, why; else 0.
            max_tokens: that it may have in all.

        Raises:
            InvalidRequest: it goes on after a stop string, where no stream does.
        """
        self._continued = True
        self.token_ids.extend(token_ids)
        if self._make_text(len(token_ids)) is not None and not finish_reason:
            raise InvalidRequest(
                f"candidate {self.index} has a stop string and no finish_reason", field="resume.candidates"
            )
        self.resumed_tokens = len(token_ids)
        self.resumed_chars = self._num_chars
        self.finish_reason = finish_reason
        self.resumed_end = bool(finish_reason)
        if not finish_reason and len(token_ids) >= max_tokens:  # nothing is left to be done for it but to say so
            self.push(replica_pb2.TokenDelta(finish_reason=_LENGTH))

    def move(self) -> None:
        """Another replica goes on with it."""
        self._continued = self._continued or bool(self.token_ids)

    def text_from(self, num_chars: int) -> str:
        """The text after so many code points."""
        if num_chars == self.num_text_chars:
            return ""
        self._text.seek(num_chars)
        return self._text.read()  # leaves it at its end, where the next piece is written

    @property
    def num_text_chars(self) -> int:
        """Code points of text so far."""
        if not self.finish_reason and self._text_end < len(self.token_ids):
            self._make_text(len(self.token_ids))
        return self._num_chars
