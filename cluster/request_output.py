"""What ``LLM`` returns, and how it grows while the engine runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.core.request import FinishReason, SamplingParams
from cluster.core.step import SampledToken
from cluster.engine.submission import Delta, Submission
from cluster.errors import EngineFault
from cluster.text.text_stream import TextStream
from cluster.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CandidateOutput:
    """One completion.

    Attributes:
        index: which candidate, from 0.
        token_ids: the completion, the token that ended it included.
        text: without the stop string or end-of-text token that ended it.
        logprobs: one per token, if they were asked for.
        finish_reason: STOP or LENGTH.
    """

    index: int
    token_ids: list[int]
    text: str
    logprobs: list[SampledToken] | None
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and its ``sampling.n`` completions; the short properties are those of the first.

    Attributes:
        prompt: the text, or None where token ids or a chat were given.
        prompt_token_ids: what the model saw, special tokens included.
        outputs: by candidate index.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CandidateOutput]

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def logprobs(self) -> list[SampledToken] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason


class RequestRun:
    """A request under way; ``source`` says in errors which of the caller's inputs it is, e.g. "prompts[3]"."""

    def __init__(
        self,
        submission_id: int,
        source: str,
        prompt: str | None,
        token_ids: list[int],
        sampling: SamplingParams,
        tokenizer: Tokenizer,
    ) -> None:
        self.submission_id = submission_id
        self.source = source
        self.prompt = prompt
        self.token_ids = token_ids
        self.sampling = sampling
        self.candidates = [
            CandidateRun(index, TextStream(tokenizer, sampling.stop, min_tokens=sampling.min_tokens))
            for index in range(sampling.n)
        ]

    @property
    def finished(self) -> bool:
        return all(candidate.finish_reason is not None for candidate in self.candidates)

    def submission(self, cache_salt: str) -> Submission:
        return Submission(
            submission_id=self.submission_id,
            prompt_token_ids=self.token_ids,
            sampling=self.sampling,
            cache_salt=cache_salt,
        )

    def output(self) -> RequestOutput:
        with_logprobs = self.sampling.logprobs is not None
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.token_ids,
            outputs=[candidate.output(with_logprobs=with_logprobs) for candidate in self.candidates],
        )


@dataclass
class CandidateRun:
    """A completion under way."""

    index: int
    text_stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[SampledToken] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def push(self, delta: Delta) -> bool:
        """Takes a delta in; True where a stop string ended the candidate before the engine did."""
        finish_reason, num_tokens = delta.finish_reason, len(delta.token_ids)
        # The token at which the engine stopped is part of the completion, but it is no text.
        shown = delta.token_ids[:-1] if finish_reason is FinishReason.STOP else delta.token_ids
        text = self.text_stream.push(shown)
        self.pieces.append(text.text)
        if text.stopped:
            finish_reason, num_tokens = FinishReason.STOP, text.num_tokens
        elif finish_reason is not None:
            self.pieces.append(self.text_stream.finish().text)
        self.token_ids += delta.token_ids[:num_tokens]
        self.logprobs += delta.logprobs[:num_tokens]
        self.finish_reason = finish_reason
        return text.stopped and delta.finish_reason is None

    def output(self, *, with_logprobs: bool) -> CandidateOutput:
        if self.finish_reason is None:
            raise EngineFault(f"candidate {self.index} has no end")
        return CandidateOutput(
            index=self.index,
            token_ids=self.token_ids,
            text="".join(self.pieces),
            logprobs=self.logprobs if with_logprobs else None,
            finish_reason=self.finish_reason,
        )
