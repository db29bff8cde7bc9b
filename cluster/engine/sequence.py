"""One candidate's tokens."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.core.request import FinishReason, SamplingParams
from cluster.core.step import NewSequence
from cluster.engine.hash_chain import HashChain
from cluster.engine.stay import Stay


class Sequence:
    """Prompt and completion of one candidate, as the engine follows it.

    Attributes:
        token_ids: prompt first; grows by one with every sample.
        num_emitted_tokens: of its completion, those that it came with: they were sampled elsewhere.
        stop_token_ids: ids that end it: end of text unless ignored, and the request's own.
        hash_chain: of its blocks; None where prefixes are not cached.
        stay: where it is, and has been.
        cached_tokens: tokens of the prompt whose KV was found when it, or the first of its siblings, started; None:
            that is still to come.
    """

    __slots__ = (
        "cached_tokens",
        "candidate_index",
        "hash_chain",
        "num_emitted_tokens",
        "num_prompt_tokens",
        "sampling",
        "sequence_id",
        "stay",
        "stop_token_ids",
        "submission_id",
        "token_ids",
    )

    def __init__(
        self,
        *,
        sequence_id: int,
        submission_id: int,
        candidate_index: int,
        prompt_token_ids: Iterable[int],
        sampling: SamplingParams,
        stop_token_ids: tuple[int, ...],
        arrived_at: float,
        emitted_token_ids: Iterable[int] = (),
        hash_chain: HashChain | None = None,
    ) -> None:
        self.sequence_id = sequence_id
        self.submission_id = submission_id
        self.candidate_index = candidate_index
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.token_ids += emitted_token_ids
        self.num_emitted_tokens = len(self.token_ids) - self.num_prompt_tokens
        self.sampling = sampling
        self.stop_token_ids = stop_token_ids
        self.hash_chain = hash_chain
        self.stay = Stay(arrived_at)
        self.cached_tokens: int | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_sampled_tokens(self) -> int:
        """Here, in this engine."""
        return self.num_output_tokens - self.num_emitted_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why nothing comes after its last token; None: something does. ``sampling.max_tokens`` is set."""
        if self.num_output_tokens > 0 and self._ends_at(self.token_ids[-1]):
            return FinishReason.STOP
        max_tokens = self.sampling.max_tokens
        return FinishReason.LENGTH if max_tokens is not None and self.num_output_tokens >= max_tokens else None

    def append(self, token_id: int) -> bool:
        """Adds a sampled token; whether it ends the text."""
        self.token_ids.append(token_id)
        return self._ends_at(token_id)

    def _ends_at(self, token_id: int) -> bool:
        return token_id in self.stop_token_ids and self.num_output_tokens > self.sampling.min_tokens

    def whole(self) -> NewSequence:
        """All of it, for a worker that does not hold it."""
        return NewSequence(
            sequence_id=self.sequence_id,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=self.sampling,
            candidate_index=self.candidate_index,
            stop_token_ids=self.stop_token_ids,
        )
