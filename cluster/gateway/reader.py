"""What a call reads of a generation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from cluster.errors import ClusterError
from cluster.gateway.candidate import Candidate
from cluster.gateway.write_pacer import WritePacer
from cluster.v1 import inference_pb2

if TYPE_CHECKING:
    from cluster.gateway.generation import Generation

_PROGRESS_INTERVAL_S = 0.5
_UNREAD_IN_A_HURRY = 0.25  # of what may be unread


class _Place:
    """How far a reader is in one candidate."""

    __slots__ = ("candidate", "ended", "num_chars", "num_tokens", "read_s", "unread_from")

    def __init__(self, candidate: Candidate, num_tokens: int, num_chars: int, ended: bool) -> None:
        self.candidate = candidate
        self.num_tokens = num_tokens
        self.num_chars = num_chars
        self.ended = ended
        self.read_s: float | None = None
        self.unread_from = candidate.num_tokens  # what was there before the reader is not held against it


class Reader:
    """One call's view of a generation: its chunks from where the call begins, or its whole answer.

    Several calls may read one generation, each at its own pace. What one does not read in time comes to it in fewer,
    larger chunks.

    Args:
        model: the served model's name.
        streams: whether it wants every delta, or only the end.
        progress: whether it wants to hear what the generation waits for.
        max_unread_tokens: a stream that leaves more of a candidate unread is ended.
        pacer: says when a stream may write.
        first_sequence: of its next chunk.
        find_places: where it begins in each candidate, asked once there are any: tokens, code points, and whether it
            has had the end. None: after what the client had before this gateway began.
    """

    def __init__(
        self,
        model: str,
        generation: Generation,
        *,
        streams: bool,
        progress: bool = False,
        max_unread_tokens: int,
        pacer: WritePacer,
        first_sequence: int = 0,
        find_places: Callable[[], list[tuple[int, int, bool]]] | None = None,
    ) -> None:
        self.model = model
        self.error: Exception | None = None
        self._generation = generation
        self._streams = streams
        self._progress = progress
        self._max_unread_tokens = max_unread_tokens
        self._turns = pacer.join(self.wake)
        self._hurries = False
        self._sequence = first_sequence
        self._find_places = find_places
        self._sent_seed = False
        self._sent_fingerprint = b""
        self._reported: inference_pb2.Progress | None = None
        self._places: list[_Place] = []
        self._waiter: asyncio.Future[None] | None = None

    @property
    def generation_id(self) -> str:
        return self._generation.generation_id

    def ledger(self) -> inference_pb2.Ledger:
        """Where the generation's time has gone so far; at any time."""
        return self._generation.ledger()

    # -- from the generation ------------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """The generation has its candidates. False: they are not what this call goes on with, and it has failed."""
        candidates = self._generation.candidates
        if self._find_places is None:
            places = [(each.resumed_tokens, each.resumed_chars, each.resumed_end) for each in candidates]
        else:
            try:
                places = self._find_places()
            except ClusterError as error:
                self.fail(error)
                return False
        self._places = [_Place(each, *place) for each, place in zip(candidates, places, strict=True)]
        return True

    def notice(self, candidate: Candidate) -> bool:
        """The candidate has something new; False where too much of it is unread."""
        if not self._streams:
            if self._generation.complete:
                self.wake()
            return True
        place = self._places[candidate.index]
        num_unread = len(candidate.token_ids) - max(place.num_tokens, place.unread_from)
        if num_unread > self._max_unread_tokens:
            return False
        if num_unread > self._max_unread_tokens * _UNREAD_IN_A_HURRY:
            self._hurries = True
        # One that writes comes back by itself.
        if self._waiter is not None and self._may_write():
            self.wake()
        return True

    def _may_write(self) -> bool:
        """Whether it is its turn; who waits for that is no slow reader."""
        return self._hurries or self._generation.complete or self._turns.has_come()

    def close(self) -> None:
        """Its call has ended."""
        self._turns.end()

    def fail(self, error: Exception) -> None:
        """Ends this reader alone."""
        self.error = self.error or error
        self.wake()

    def wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    # -- for the call -------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Every candidate has finished and been read, without an error."""
        generation = self._generation
        if not generation.complete or generation.error is not None or self.error is not None:
            return False
        return all(place.ended for place in self._places)

    async def begun(self) -> None:
        """Returns when the generation has been sent to a replica, or is about to be.

        Raises:
            Exception: it cannot be.
        """
        generation = self._generation
        while True:
            error = self.error or generation.error
            if error is not None:
                raise error
            if generation.candidates:
                return
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def wait(self) -> None:
        """Returns when there is something to take: a delta or news for a stream, else all candidates whole.

        Raises:
            Exception: the generation failed, or this reader.
        """
        generation = self._generation
        while True:
            error = self.error or generation.error
            if error is not None:
                raise error
            if self._readable() and self._may_write():
                return
            self._waiter = asyncio.get_running_loop().create_future()
            if self._progress and generation.progress() is not None:
                await asyncio.wait([self._waiter], timeout=_PROGRESS_INTERVAL_S)  # positions change by themselves
            else:
                await self._waiter

    def _readable(self) -> bool:
        if not self._streams:
            return self._generation.complete
        for place in self._places:
            candidate = place.candidate
            if len(candidate.token_ids) > place.num_tokens or (candidate.finish_reason and not place.ended):
                return True
        return self._progress and self._has_progress()

    def _has_progress(self) -> bool:
        progress = self._generation.progress()
        return progress is not None and progress != self._reported

    def take(self) -> list[inference_pb2.GenerateChunk]:
        """The unread chunks, at most one per candidate, numbered in the order of the stream."""
        self._turns.take()
        self._hurries = False
        chunks = []
        for place in self._places:
            candidate = place.candidate
            if len(candidate.token_ids) > place.num_tokens or (candidate.finish_reason and not place.ended):
                chunks.append(self._read(place))
        if not chunks and self._progress and self._has_progress():
            self._reported = self._generation.progress()
            chunks.append(
                inference_pb2.GenerateChunk(
                    generation_id=self.generation_id, sequence=self._sequence, progress=self._reported
                )
            )
            self._sequence += 1
        return chunks

    def _read(self, place: _Place) -> inference_pb2.GenerateChunk:
        generation, candidate = self._generation, place.candidate
        start = place.num_tokens
        text = candidate.text_from(place.num_chars)
        chunk = inference_pb2.GenerateChunk(
            generation_id=generation.generation_id,
            sequence=self._sequence,
            candidate_index=candidate.index,
            text_delta=text,
            text_offset=place.num_chars,
            token_ids=candidate.token_ids[start:] if start else candidate.token_ids,
            token_offset=start,
        )
        self._sequence += 1
        if candidate.logprobs:
            chunk.logprobs.extend(candidate.logprobs[start - candidate.resumed_tokens :])
        num_tokens, now = len(candidate.token_ids), time.monotonic()
        if place.read_s is not None and num_tokens > start:
            generation.record_gap((now - place.read_s) / (num_tokens - start))
        place.read_s = now
        place.num_tokens = num_tokens
        place.num_chars += len(text)
        if not self._sent_seed:
            self._sent_seed = True
            chunk.seed = generation.seed
        if self._sent_fingerprint != generation.fingerprint:
            self._sent_fingerprint = chunk.fingerprint = generation.fingerprint
        if candidate.finish_reason:
            place.ended = True
            chunk.finish_reason = candidate.finish_reason
            chunk.usage.prompt_tokens = generation.num_prompt_tokens
            chunk.usage.cached_tokens = candidate.cached_tokens
            chunk.usage.completion_tokens = len(candidate.token_ids)
        return chunk

    async def __aiter__(self) -> AsyncIterator[inference_pb2.GenerateChunk]:
        while not self.done:
            await self.wait()
            for chunk in self.take():
                yield chunk

    async def response(self) -> inference_pb2.GenerateResponse:
        """All candidates, whole."""
        await self.wait()
        generation = self._generation
        for candidate in generation.candidates:
            first_s, last_s = candidate.first_token_s, candidate.last_token_s
            if first_s is not None and last_s is not None and len(candidate.token_ids) > 1:
                generation.record_gap((last_s - first_s) / (len(candidate.token_ids) - 1))
        return inference_pb2.GenerateResponse(
            generation_id=generation.generation_id,
            model=self.model,
            seed=generation.seed,
            candidates=[
                inference_pb2.Candidate(
                    index=candidate.index,
                    text=candidate.text_from(0),
                    token_ids=candidate.token_ids,
                    logprobs=candidate.logprobs,
                    finish_reason=candidate.finish_reason,
                )
                for candidate in generation.candidates
            ],
            usage=inference_pb2.Usage(
                prompt_tokens=generation.num_prompt_tokens,
                cached_tokens=max(candidate.cached_tokens for candidate in generation.candidates),
                completion_tokens=generation.num_tokens,
            ),
        )
