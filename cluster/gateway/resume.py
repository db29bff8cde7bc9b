"""Going on with a stream that was cut off, from what its client has had of it."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import DecodeError

from cluster.core.request import SamplingParams
from cluster.errors import AlreadyExists, InvalidRequest
from cluster.gateway.candidate import Candidate
from cluster.gateway.convert import MAX_REQUEST_ID_LENGTH
from cluster.gateway.generation import Generation
from cluster.text.text_stream import TextStream
from cluster.v1 import inference_pb2, replica_pb2


def check_resume(resume: inference_pb2.Resume, sampling: SamplingParams) -> None:
    """Raises InvalidRequest: it fits no stream of such a request."""
    generation_id = resume.generation_id
    if len(generation_id) > MAX_REQUEST_ID_LENGTH or not generation_id.isprintable():
        raise InvalidRequest("this is no generation_id of ours", field="resume.generation_id")
    if sampling.seed is not None and sampling.seed != resume.seed:
        raise InvalidRequest(
            f"the request's seed is {sampling.seed}, the resumed stream's {resume.seed}", field="resume.seed"
        )
    seen = set()
    for position, had in enumerate(resume.candidates):
        field = f"resume.candidates[{position}]"
        if had.index >= sampling.n or had.index in seen:
            raise InvalidRequest(
                f"candidate {had.index} is there twice, or is none of the request's {sampling.n}",
                field=f"{field}.index",
            )
        seen.add(had.index)
        if had.finish_reason not in inference_pb2.FinishReason.values():
            raise InvalidRequest(f"{had.finish_reason} is no finish reason", field=f"{field}.finish_reason")


def check_resumed_tokens(resume: inference_pb2.Resume, *, max_tokens: int, vocab_size: int) -> None:
    """Raises InvalidRequest: the model can never have generated this."""
    for position, had in enumerate(resume.candidates):
        field = f"resume.candidates[{position}].token_ids"
        if len(had.token_ids) > max_tokens:
            raise InvalidRequest(
                f"the candidate has {len(had.token_ids)} tokens; max_tokens and the context allow {max_tokens}",
                field=field,
            )
        if had.token_ids and max(had.token_ids) >= vocab_size:
            raise InvalidRequest(f"a token is not in the model's vocabulary of {vocab_size} tokens", field=field)


def fingerprint_of(resume: inference_pb2.Resume) -> replica_pb2.Fingerprint | None:
    """Of whoever made the tokens that the client has; None: it was not told.

    Raises:
        InvalidRequest: it is none.
    """
    if not resume.fingerprint:
        return None
    try:
        return replica_pb2.Fingerprint.FromString(resume.fingerprint)
    except DecodeError:
        raise InvalidRequest("this is no fingerprint of ours", field="resume.fingerprint") from None


def resumed_candidates(
    resume: inference_pb2.Resume, sampling: SamplingParams, create: Callable[[], TextStream]
) -> list[Candidate]:
    """New candidates that go on after what the client has had; ``sampling.max_tokens`` is set."""
    candidates = [Candidate(index, create()) for index in range(sampling.n)]
    for had in resume.candidates:
        candidates[had.index].resume(had.token_ids, had.finish_reason, max_tokens=sampling.max_tokens)
    return candidates


def places_in(
    generation: Generation, resume: inference_pb2.Resume, create: Callable[[], TextStream]
) -> list[tuple[int, int, bool]]:
    """Where a call that joins a generation begins to read each of its candidates: see Reader.

    Raises:
        AlreadyExists: the generation does not have what comes before its own beginning.
        InvalidRequest: the client's tokens are not the generation's.
    """
    places = [(0, 0, False)] * len(generation.candidates)
    for position, had in enumerate(resume.candidates):
        candidate = generation.candidates[had.index]
        num_tokens = len(had.token_ids)
        if candidate.token_ids[:num_tokens] != list(had.token_ids):
            raise InvalidRequest(
                "these are not the tokens of the generation that goes by this name",
                field=f"resume.candidates[{position}].token_ids",
            )
        if had.finish_reason:
            places[had.index] = (num_tokens, candidate.num_text_chars, True)
        else:
            places[had.index] = (num_tokens, len(create().push(had.token_ids).text), False)
    for candidate, (num_tokens, _, _) in zip(generation.candidates, places, strict=True):
        if num_tokens < candidate.resumed_tokens:
            raise AlreadyExists(
                "a call that has resumed this request runs: resume it, too, or wait for its end", field="request_id"
            )
    return places
