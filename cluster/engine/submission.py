"""What goes into an engine and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.core.prefix_cache import CacheChanges
from cluster.core.request import FinishReason, Priority, SamplingParams
from cluster.core.step import SampledToken
from cluster.engine.stay import StayTimes
from cluster.errors import ClusterError


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request for ``sampling.n`` candidates, or for what is missing of some of them.

    Attributes:
        submission_id: the caller's; unique among live submissions.
        prompt_token_ids: at least one.
        sampling: an unset seed is drawn by the engine; ``max_tokens`` is cut to what the context holds.
        priority: class.
        deadline: on the engine's clock, in seconds; None: none.
        cache_salt: only submissions with the same salt share cached blocks.
        emitted: where the work goes on that another engine began: the candidates that are to go on, by index, with the
            tokens of each, maybe none. They count as its completion and are not emitted again; what follows is what
            would have followed there. Empty: all candidates, from the beginning.
    """

    submission_id: int
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    priority: Priority = Priority.P1
    deadline: float | None = None
    cache_salt: str = ""
    emitted: Mapping[int, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What one step added to one candidate.

    Attributes:
        token_ids: none where all of them were emitted elsewhere.
        finish_reason: on its last delta.
        cached_tokens: tokens of the prompt whose KV was found in the prefix cache; on its first and last delta, since
            the reader of a stream may be the one who ends it.
        times: on its last delta.
    """

    submission_id: int
    candidate_index: int
    token_ids: list[int]
    logprobs: list[SampledToken]
    finish_reason: FinishReason | None
    cached_tokens: int
    times: StayTimes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The end of a whole submission without a result.

    Attributes:
        error: why. ReplicaLost: the engine has died, and the submission can go on elsewhere from what was emitted.
        num_emitted_tokens: with ReplicaLost, of each candidate that was not done, by its index, how many tokens its
            deltas have brought. No more will come.
    """

    submission_id: int
    error: ClusterError
    num_emitted_tokens: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEvents:
    """What a step yielded.

    Attributes:
        cache_changes: which content of KV blocks has become findable, or lost, since the step before.
    """

    deltas: list[Delta] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    cache_changes: CacheChanges = field(default_factory=CacheChanges)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoad:
    """How busy an engine is.

    Attributes:
        running, waiting: sequences in the batch, and queued.
        free_blocks, num_blocks: KV blocks.
        queued_tokens: tokens known but not yet computed.
        num_preemptions: since the engine started.
        step_s: what a step takes without prompts, in seconds, as measured lately; 0: not known.
        prompt_token_s: what each token of a prompt adds to a step, in seconds; 0: not known.
        tokens_per_s: tokens computed per second of work, prompts and completions; 0: not known.
    """

    running: int
    waiting: int
    free_blocks: int
    num_blocks: int
    queued_tokens: int
    num_preemptions: int
    step_s: float = 0.0
    prompt_token_s: float = 0.0
    tokens_per_s: float = 0.0
