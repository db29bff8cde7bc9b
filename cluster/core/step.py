"""One engine step as data: what the engine tells a worker, and what comes back.

Plain, frozen and serialisable, because it crosses a socket when a replica has several shards. A sequence travels whole
once (``NewSequence``); after that only what changed travels (``ScheduledSequence``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.core.request import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class NewSequence:
    """A sequence the worker does not hold: new, or back after a preemption.

    Attributes:
        sequence_id: as in ScheduledSequence.
        token_ids: every token known so far, prompt first.
        num_prompt_tokens: how many of them are the prompt; penalties and positions tell prompt from completion.
        sampling: as asked; ``seed`` is set.
        candidate_index: part of the random key (seed, candidate_index, position).
        stop_token_ids: end-of-text ids (unless ignored) and the request's own; masked before ``min_tokens``.
    """

    sequence_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    candidate_index: int
    stop_token_ids: tuple[int, ...]


class ScheduledSequence(NamedTuple):
    """A sequence's share of one step: compute ``num_new_tokens`` tokens after the first ``num_computed_tokens``.

    A tuple, because every step has one of each sequence: it is made, sent and read several times faster.

    Attributes:
        num_computed_tokens: above 0 in a NewSequence's first share where the prefix cache, a sibling or host memory
            holds the KV of its first tokens.
        new_block_ids: KV blocks appended to its block table by this step. A NewSequence starts from an empty table, so
            its first share brings the whole of it.
        samples: whether the last computed position yields a token (false inside a chunked prompt).
    """

    sequence_id: int
    num_computed_tokens: int
    num_new_tokens: int
    new_block_ids: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ParkedBlocks:
    """KV blocks of one sequence on their way to host memory, or back into the pool.

    Attributes:
        block_ids: in the order of the sequence's tokens.
        first_index: place in the sequence's block table of the first of them.
    """

    sequence_id: int
    block_ids: tuple[int, ...]
    first_index: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInput:
    """Work for one forward pass.

    A worker goes through it in the order ``dropped``, ``parked``, ``resumed``, ``copies``, ``new``, ``scheduled``: each
    reads what those before it, and earlier steps, have left in the pool.

    Attributes:
        dropped: sequences whose state the worker forgets, what it has parked of them included.
        parked: blocks to keep in host memory, under the sequence's id, until they are resumed or dropped. Their
            sequence is dropped in the same step: it comes back as a NewSequence.
        resumed: parked blocks to write to the pool; all that is parked of the sequence is released by it.
        copies: (source, destination) pairs of whole blocks within the pool, in order.
    """

    step_id: int
    new: tuple[NewSequence, ...]
    scheduled: tuple[ScheduledSequence, ...]
    dropped: tuple[int, ...]
    parked: tuple[ParkedBlocks, ...] = ()
    resumed: tuple[ParkedBlocks, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledToken:
    """A token drawn at a position, with log probabilities (natural, of the raw model distribution) if asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """Result of the StepInput with the same ``step_id``.

    Attributes:
        sampled: one token per sequence that sampled.
        failed: sequences that should have sampled and could not, and why; the others are not touched by it. What was
            planned ahead for such a sequence fails too.
        parking_s: seconds that the step's ``parked`` and ``resumed`` blocks took.
        forward_s, sampling_s: seconds of the host that the model took, output head included, and drawing the tokens. A
            device that runs behind the host may work on during the latter.
    """

    step_id: int
    sampled: dict[int, SampledToken]
    failed: dict[int, str] = field(default_factory=dict)
    parking_s: float = 0.0
    forward_s: float = 0.0
    sampling_s: float = 0.0
