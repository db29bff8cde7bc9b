"""One candidate on its way from tokens to chunks."""

from __future__ import annotations

from cluster.core.request import FinishReason
from cluster.text.text_stream import TextStream
from cluster.v1 import inference_pb2, replica_pb2
from cluster.wire import finish_reason_to_proto

_STOP = finish_reason_to_proto(FinishReason.STOP)


class Candidate:
    """Turns token deltas into at most one unread chunk: what a client does not read in time is merged into it.

    Attributes:
        finished: the last token has come; ``chunk`` holds it until it is taken.
        num_tokens: completion tokens so far.
        cached_tokens: of the prompt, those served from the prefix cache.
        unread_tokens: tokens in the unread chunk.
        last_token_s: when the last delta came, in monotonic seconds; None before the first.
    """

    __slots__ = (
        "_chunk", "_generation_id", "_num_chars", "_num_prompt_tokens", "_text", "_text_stream", "cached_tokens",
        "finished", "index", "last_token_s", "num_tokens", "unread_tokens",
    )  # fmt: skip

    def __init__(self, generation_id: str, index: int, num_prompt_tokens: int, text_stream: TextStream) -> None:
        self._generation_id = generation_id
        self.index = index
        self._num_prompt_tokens = num_prompt_tokens
        self._text_stream = text_stream
        self._chunk: inference_pb2.GenerateChunk | None = None
        self._text: list[str] = []
        self._num_chars = 0
        self.finished = False
        self.num_tokens = 0
        self.cached_tokens = 0
        self.unread_tokens = 0
        self.last_token_s: float | None = None

    @property
    def readable(self) -> bool:
        return self._chunk is not None

    def push(self, delta: replica_pb2.TokenDelta) -> None:
        """Takes a delta in. A stop string ends the candidate even where the replica has not: see ``finished``."""
        token_ids, finish_reason = delta.token_ids, delta.finish_reason
        # The token at which the replica stopped is reported, but it is no text.
        shown = token_ids[:-1] if finish_reason == _STOP else token_ids
        text = self._text_stream.push(shown)
        pieces = text.text
        num_tokens = len(token_ids)
        if text.stopped:
            finish_reason, num_tokens = _STOP, text.num_tokens
        elif finish_reason:
            pieces += self._text_stream.finish().text
        chunk = self._chunk
        if chunk is None:
            chunk = self._chunk = inference_pb2.GenerateChunk(
                generation_id=self._generation_id,
                candidate_index=self.index,
                token_ids=token_ids[:num_tokens],
                token_offset=self.num_tokens,
            )
        else:
            chunk.token_ids.extend(token_ids[:num_tokens])
        if delta.logprobs:
            chunk.logprobs.extend(delta.logprobs[:num_tokens])
        if pieces:
            self._text.append(pieces)
        self.num_tokens += num_tokens
        self.unread_tokens += num_tokens
        if delta.cached_tokens:
            self.cached_tokens = delta.cached_tokens
        if finish_reason:
            self.finished = True
            chunk.finish_reason = finish_reason
            chunk.usage.prompt_tokens = self._num_prompt_tokens
            chunk.usage.cached_tokens = self.cached_tokens
            chunk.usage.completion_tokens = self.num_tokens

    def take(self) -> inference_pb2.GenerateChunk:
        """The unread chunk; only while ``readable``."""
        chunk, self._chunk = self._chunk, None
        chunk.text_delta = text = "".join(self._text)
        chunk.text_offset = self._num_chars
        self._num_chars += len(text)
        self._text.clear()
        self.unread_tokens = 0
        return chunk

    def drop(self) -> None:
        """Forgets what is unread: nobody will read it."""
        self._chunk = None
        self._text.clear()
        self.unread_tokens = 0
