"""How fast an engine gets on with its steps, as measured lately."""

from __future__ import annotations

import math

from cluster.core.linear_fit import LinearFit
from cluster.core.schedule import Schedule

_MEMORY_S = 10.0  # of work: what is older counts less than 1/e
_SMOOTHING = 0.1


class StepPace:
    """Fits a step's time with a fixed part, a part per sequence that decodes, and a part per token of a prompt.

    Attributes:
        tokens_per_s: tokens computed per second of work, prompts and completions; 0: nothing has run yet.
    """

    def __init__(self) -> None:
        # Scales: a first guess of a step's time is nil, and these say how far off it may be.
        self._fit = LinearFit((1.0, 1e-2, 1e-2))
        self._num_decodes: float | None = None  # sequences per step with decodes, smoothed
        self._num_prompt_tokens = 0
        self._num_tokens = 0.0
        self._work_s = 0.0
        self.tokens_per_s = 0.0

    @property
    def step_s(self) -> float:
        """What a step takes without prompts, with as many decodes as steps have had lately, in seconds; 0: not
        known."""
        fixed_s, decode_s, _ = self._fit.weights
        return 0.0 if self._num_decodes is None else max(fixed_s + decode_s * self._num_decodes, 0.0)

    @property
    def prompt_token_s(self) -> float:
        """What each token of a prompt adds to a step, in seconds; 0: not known."""
        return max(self._fit.weights[2], 0.0) if self._num_prompt_tokens else 0.0

    def observe(self, schedule: Schedule, duration_s: float) -> None:
        """A step has taken so long; one of no tokens or no time says nothing."""
        num_decodes = num_prompt_tokens = 0
        for share in schedule.scheduled:
            if share.num_new_tokens == 1:
                num_decodes += 1
            else:
                num_prompt_tokens += share.num_new_tokens
        if duration_s <= 0.0 or not schedule.scheduled:
            return
        self._fit.observe((1.0, num_decodes, num_prompt_tokens), duration_s)
        self._num_prompt_tokens += num_prompt_tokens
        if num_decodes:
            previous = num_decodes if self._num_decodes is None else self._num_decodes
            self._num_decodes = previous + _SMOOTHING * (num_decodes - previous)
        kept = math.exp(-duration_s / _MEMORY_S)
        self._num_tokens = kept * self._num_tokens + num_decodes + num_prompt_tokens
        self._work_s = kept * self._work_s + duration_s
        self.tokens_per_s = self._num_tokens / self._work_s
