"""What a client has had of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.errors import EngineFault
from cluster.v1 import inference_pb2 as pb


@dataclass
class _Candidate:
    token_ids: list[int] = field(default_factory=list)
    text_length: int = 0
    finish_reason: int = pb.FINISH_REASON_UNSPECIFIED


class Received:
    """Keeps what it takes to go on with a stream at any gateway, and sees to it that each token came exactly once.

    Attributes:
        started: whether anything of an answer came; progress is none.
    """

    def __init__(self, request: pb.GenerateRequest) -> None:
        self.started = False
        self._request = request
        self._num_candidates = request.sampling.n if request.sampling.HasField("n") else 1
        self._candidates: dict[int, _Candidate] = {}
        self._generation_id = ""
        self._seed: int | None = None
        self._sequence = 0
        self._fingerprint = b""

    def add(self, chunk: pb.GenerateChunk) -> None:
        """Books a chunk.

        Raises:
            EngineFault: it does not begin where the one before it ended.
        """
        self._sequence = chunk.sequence + 1
        self._generation_id = chunk.generation_id
        if chunk.HasField("seed"):
            self._seed = chunk.seed
        self._fingerprint = chunk.fingerprint or self._fingerprint
        if chunk.HasField("progress"):
            return
        self.started = True
        candidate = self._candidates.setdefault(chunk.candidate_index, _Candidate())
        if (chunk.token_offset, chunk.text_offset) != (len(candidate.token_ids), candidate.text_length):
            raise EngineFault(
                f"the stream of candidate {chunk.candidate_index} went on at token {chunk.token_offset} and character "
                f"{chunk.text_offset}, not at {len(candidate.token_ids)} and {candidate.text_length}"
            )
        candidate.token_ids.extend(chunk.token_ids)
        candidate.text_length += len(chunk.text_delta)
        candidate.finish_reason = chunk.finish_reason

    @property
    def complete(self) -> bool:
        """Whether every candidate has come to its end."""
        finished = sum(candidate.finish_reason != 0 for candidate in self._candidates.values())
        return finished == self._num_candidates

    def next_request(self) -> pb.GenerateRequest:
        """The request as it was first sent; once something came, with what came."""
        if not self.started:
            return self._request
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        request.resume.generation_id = self._generation_id
        request.resume.seed = self._seed or 0
        request.resume.sequence = self._sequence
        request.resume.fingerprint = self._fingerprint
        for index, candidate in sorted(self._candidates.items()):
            request.resume.candidates.add(
                index=index, token_ids=candidate.token_ids, finish_reason=candidate.finish_reason
            )
        return request
