"""What becomes of a submission: one sequence per candidate, and what the scheduler knows of each."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import replace

from cluster.core.block_hash import block_hashes
from cluster.core.model_info import ModelInfo
from cluster.core.request import Request
from cluster.engine.hash_chain import HashChain
from cluster.engine.sequence import Sequence
from cluster.engine.submission import Submission
from cluster.errors import InvalidRequest


class Intake:
    """Checks submissions and makes their sequences.

    Args:
        model: that they are for.
        prefix_cache: whether their blocks get names.
    """

    def __init__(self, model: ModelInfo, *, prefix_cache: bool) -> None:
        self._model = model
        self._prefix_cache = prefix_cache
        self._seeds = random.SystemRandom()

    def take(self, submission: Submission, first_id: int, arrival: float) -> list[tuple[Sequence, Request]]:
        """Each candidate's sequence, numbered from ``first_id`` on, and what the scheduler knows of it. One that is
        complete as it comes has a ``finish_reason``, and nothing to schedule.

        Raises:
            InvalidRequest: it can never run here; the error names the field.
        """
        self._validate(submission)
        model, sampling, prompt = self._model, submission.sampling, submission.prompt_token_ids
        room = model.max_model_len - len(prompt)
        max_tokens = min(sampling.max_tokens or room, room)
        seed = self._seeds.getrandbits(64) if sampling.seed is None else sampling.seed
        sampling = replace(sampling, seed=seed, max_tokens=max_tokens)  # refuses min_tokens that do not fit there
        eos_token_ids = () if sampling.ignore_eos else model.eos_token_ids
        salt = submission.cache_salt.encode()
        prompt_hashes = block_hashes(prompt, model.block_size, salt) if self._prefix_cache else []
        emitted = submission.emitted or dict.fromkeys(range(sampling.n), ())
        taken: list[tuple[Sequence, Request]] = []
        for sequence_id, candidate_index in enumerate(sorted(emitted), start=first_id):
            hash_chain = HashChain(model.block_size, salt, prompt_hashes) if self._prefix_cache else None
            sequence = Sequence(
                sequence_id=sequence_id,
                submission_id=submission.submission_id,
                candidate_index=candidate_index,
                prompt_token_ids=prompt,
                arrived_at=arrival,
                emitted_token_ids=emitted[candidate_index],
                sampling=sampling,
                stop_token_ids=(*eos_token_ids, *sampling.stop_token_ids),
                hash_chain=hash_chain,
            )
            later_hashes = [] if hash_chain is None else hash_chain.extend(sequence.token_ids)
            request = Request(
                request_id=sequence_id,
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_emitted_tokens=sequence.num_emitted_tokens,
                max_tokens=max_tokens,
                priority=submission.priority,
                arrival=arrival,
                deadline=submission.deadline,
                block_hashes=(*prompt_hashes, *later_hashes),
                group=first_id if len(emitted) > 1 else None,
            )
            taken.append((sequence, request))
        return taken

    def _validate(self, submission: Submission) -> None:
        prompt, model = submission.prompt_token_ids, self._model
        if not prompt:
            raise InvalidRequest("the prompt has no tokens", field="prompt")
        self._check_vocabulary("the prompt", prompt, "token_ids")
        if len(prompt) >= model.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens; the model's context holds {model.max_model_len}, one of which "
                "must be left for the completion",
                field="prompt",
            )
        submission.sampling.check_vocabulary(model.vocab_size)
        for candidate_index, token_ids in submission.emitted.items():
            if not 0 <= candidate_index < submission.sampling.n:
                raise InvalidRequest(
                    f"candidate {candidate_index} is to go on, of {submission.sampling.n}", field="emitted"
                )
            if token_ids:
                self._check_vocabulary(f"what candidate {candidate_index} has emitted", token_ids, "emitted")

    def _check_vocabulary(self, what: str, token_ids: Collection[int], field: str) -> None:
        if min(token_ids) < 0 or max(token_ids) >= self._model.vocab_size:
            raise InvalidRequest(
                f"{what} holds a token id outside the vocabulary of {self._model.vocab_size}", field=field
            )
