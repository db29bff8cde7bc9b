"""How many tokens of prompts go with a step's decodes."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.core.config import SchedulerConfig
from cluster.core.linear_fit import LinearFit
from cluster.core.schedule import Schedule

_FIRST_CHUNK_TOKENS = 64
_MAX_GROWTH = 2
_NUM_DEVIATIONS = 2.5  # mean ones: two standard deviations of a normal distribution


class StepBudget:
    """Cuts prompts so that steps with decodes take no longer than a target.

    A step's time is fitted as it is observed: a fixed part, and parts for each decoding sequence, each token of a
    prompt and each token of context that is read. The budget is the largest number of prompt tokens with which the
    fitted time, plus some of what steps usually deviate from it, stays within the target. Two bounds hold in any case:
    a step gets at least ``min_prefill_tokens``, so that prompts get on where decodes alone are beyond the target, and
    at most twice the largest chunk that was observed, since nothing is known beyond.

    Where nobody decodes nobody waits for a next token, and ``max_num_batched_tokens`` is the only limit.

    Args:
        config: target and limit.
        min_prefill_tokens: what every step may take of prompts.
    """

    def __init__(self, config: SchedulerConfig, min_prefill_tokens: int) -> None:
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._target_s = None if config.target_itl_ms is None else config.target_itl_ms / 1e3
        self._min_prefill_tokens = min_prefill_tokens
        self._largest_chunk = _FIRST_CHUNK_TOKENS // _MAX_GROWTH
        # Scales of the four parts: a first guess of a step's time is nil, and these say how far off it may be.
        self._fit = LinearFit((1.0, 1e-2, 1e-2, 1e-4))

    def num_prefill_tokens(self, num_decodes: int, contexts: Iterable[int]) -> int:
        """How many tokens of prompts the next step may have.

        Args:
            num_decodes: sequences that miss one token.
            contexts: how many tokens each of these attends to.
        """
        limit = self._max_num_batched_tokens - num_decodes
        if self._target_s is None or num_decodes == 0:
            return limit
        fixed_s, decode_s, token_s, context_s = self._fit.weights
        left_s = self._target_s - _NUM_DEVIATIONS * self._fit.deviation
        left_s -= fixed_s + num_decodes * decode_s + sum(contexts) * context_s
        # A part that is nil or less is not known yet, or lost in noise.
        fitting = int(max(left_s, 0.0) / token_s) if token_s > 0.0 else _FIRST_CHUNK_TOKENS
        num_tokens = min(fitting, _MAX_GROWTH * self._largest_chunk)
        return min(max(num_tokens, self._min_prefill_tokens), limit)

    def observe(self, schedule: Schedule, duration_s: float) -> None:
        """A step has taken so long."""
        if self._target_s is None:
            return
        num_decodes = num_tokens = num_context_tokens = 0
        for share in schedule.scheduled:
            if share.num_new_tokens == 1:
                num_decodes += 1
            else:
                num_tokens += share.num_new_tokens
            num_context_tokens += share.num_computed_tokens
        self._fit.observe((1.0, num_decodes, num_tokens, num_context_tokens), duration_s)
        self._largest_chunk = max(self._largest_chunk, num_tokens)
