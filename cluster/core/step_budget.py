"""How many tokens of prompts go with a step's decodes."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.core.config import SchedulerConfig
from cluster.core.linear_fit import LinearFit
from cluster.core.schedule import Schedule

_FIRST_CHUNK_TOKENS = 64
_MAX_GROWTH = 2
_LATE_SHARE = 0.01  # of the steps with decodes and chunks: those that may take longer than the target
_MARGIN_GAIN = 0.5  # mean deviations by which the margin follows a step


class StepBudget:
    """Cuts prompts so that steps with decodes take no longer than a target.

    A step's time is fitted as it is observed: a fixed part, and parts for each decoding sequence, each token that these
    attend to, each token of a prompt, and each pair of such a token and one that it attends to: late chunks of a long
    prompt cost more than early ones. The budget is the largest number of prompt tokens with which the fitted time and a
    margin stay within the target. The margin is a quantile of what the fit fell short by, followed by stochastic
    approximation (Robbins and Monro, 1951), so that of the steps that are cut about one in a hundred takes longer than
    the target, whatever noise the machine has. It is at most twice the largest chunk that was observed, since nothing
    is known beyond. Where decodes leave no room, prompts wait until some have ended: were they let in, there would be
    more decodes still. Only for whom that is too long, and where a single decode exceeds the target already, so that
    nothing keeps it, a step takes ``min_prefill_tokens``.

    Where nobody decodes nobody waits for a next token, and ``max_num_batched_tokens`` is the only limit.

    In a pipeline a sequence's next token comes ``num_stages`` steps after the last, so each step has that part of the
    target. A step's time is there what it adds to the course of steps, from the end of the one before it to its own.

    Args:
        config: target and limit.
        min_prefill_tokens: what a step takes of prompts where the target cannot be kept.
        num_stages: of the pipeline that runs the steps.
    """

    def __init__(self, config: SchedulerConfig, min_prefill_tokens: int, num_stages: int = 1) -> None:
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._target_s = None if config.target_itl_ms is None else config.target_itl_ms / 1e3 / num_stages
        self._min_prefill_tokens = min_prefill_tokens
        self._largest_chunk = _FIRST_CHUNK_TOKENS // _MAX_GROWTH
        self._margin_s = 0.0
        # Scales of the five parts: a first guess of a step's time is nil, and these say how far off it may be.
        self._fit = LinearFit((1.0, 1e-2, 1e-4, 1e-2, 1e-6))

    def num_prefill_tokens(
        self,
        num_decodes: int,
        contexts: Iterable[int],
        prefill_start: int,
        *,
        may_wait: bool = True,
        others_decode: bool = False,
    ) -> int:
        """How many tokens of prompts the next step may have.

        Args:
            num_decodes: sequences that get their next token in it.
            contexts: how many tokens each of these attends to.
            prefill_start: how many tokens of a prompt come before its chunk; the most of those that may be next.
            may_wait: whether prompts can be left until decodes have ended.
            others_decode: whether there are sequences that get their next token in steps right before or after it.
        """
        limit = self._max_num_batched_tokens - num_decodes
        if self._target_s is None or (num_decodes == 0 and not others_decode):
            return limit
        fixed_s, decode_s, context_s, token_s, pair_s = self._fit.weights
        left_s = self._target_s - self._margin_s - fixed_s
        each_s = decode_s + sum(contexts) / max(num_decodes, 1) * context_s
        least = 0 if may_wait and left_s >= each_s else self._min_prefill_tokens
        left_s = max(left_s - num_decodes * each_s, 0.0)
        token_s += max(pair_s, 0.0) * prefill_start
        # A part that is nil or less is not known yet, or lost in noise.
        fitting = int(left_s / token_s) if token_s > 0.0 else _FIRST_CHUNK_TOKENS
        if token_s > 0.0 and pair_s > 0.0:  # the chunk's tokens attend to each other too: half of them, on average
            fitting = int(left_s / (token_s + pair_s * fitting / 2))
        num_tokens = min(fitting, _MAX_GROWTH * self._largest_chunk)
        return min(max(num_tokens, least), limit)

    def observe(self, schedule: Schedule, duration_s: float) -> None:
        """A step has taken so long."""
        if self._target_s is None:
            return
        num_decodes = num_context_tokens = num_tokens = num_pairs = 0
        for share in schedule.scheduled:
            if share.num_new_tokens == 1:
                num_decodes += 1
                num_context_tokens += share.num_computed_tokens
            else:
                num_tokens += share.num_new_tokens
                num_pairs += share.num_new_tokens * (2 * share.num_computed_tokens + share.num_new_tokens) // 2
        if num_decodes == 0:  # it was not cut: a large one would draw the fit away from those that are
            return
        shortfall_s = self._fit.observe((1.0, num_decodes, num_context_tokens, num_tokens, num_pairs), duration_s)
        if num_tokens and self._fit.is_settled:
            move = 1 - _LATE_SHARE if shortfall_s > self._margin_s else -_LATE_SHARE
            self._margin_s = max(0.0, self._margin_s + _MARGIN_GAIN * move * self._fit.deviation)
        self._largest_chunk = max(self._largest_chunk, num_tokens)
