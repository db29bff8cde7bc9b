"""What a request will cost, before it is known."""

from __future__ import annotations

import math

_FIRST_BYTES_PER_TOKEN = 4.0
_FIRST_COMPLETION_TOKENS = 256.0
_MIN_BYTES = 64
_SMOOTHING = 0.02
_NUM_DEVIATIONS = 2.5


class BytesPerToken:
    """A bound on how many bytes of text make a token, learned from prompts: few have more.

    So the tokens that a text is charged with before they are counted are a lower bound: who is refused by it would be
    refused by their number too.
    """

    def __init__(self) -> None:
        self._mean = math.log(_FIRST_BYTES_PER_TOKEN)
        self._deviation = 0.25

    @property
    def bound(self) -> float:
        """Well above the mean of its logarithm, by what is usual to differ from that."""
        return math.exp(self._mean + _NUM_DEVIATIONS * self._deviation)

    def num_tokens(self, num_bytes: int) -> int:
        """That a text of so many bytes has at least, as a rule; 1 at least."""
        return max(1, int(num_bytes / self.bound))

    def observe(self, num_bytes: int, num_tokens: int) -> None:
        """A text and its tokens. Short ones tell little: templates and special tokens weigh too much in them."""
        if num_bytes < _MIN_BYTES or num_tokens < 1:
            return
        error = math.log(num_bytes / num_tokens) - self._mean
        self._mean += _SMOOTHING * error
        self._deviation += _SMOOTHING * (abs(error) - self._deviation)


class CompletionLength:
    """How long completions usually are, in tokens and in time: moving means, which a request's own limit cuts."""

    def __init__(self) -> None:
        self._mean = _FIRST_COMPLETION_TOKENS
        self._token_s = 0.0

    def expected(self, max_tokens: int | None, num_candidates: int) -> int:
        """Tokens of all candidates together; 1 each at least.

        Args:
            max_tokens: of each candidate; None: as many as the context holds.
        """
        expected = self._mean if max_tokens is None else min(self._mean, max_tokens)
        return max(1, round(expected)) * num_candidates

    def expected_s(self, num_tokens: float) -> float:
        """Until the end of a completion of so many tokens, from its turn on, in seconds; 0 before any has run."""
        return self._token_s * num_tokens

    def observe(self, num_tokens: int, num_candidates: int, duration_s: float) -> None:
        """What a request that has run has generated, all candidates together, and how long it took from its turn on."""
        length = num_tokens / num_candidates
        self._mean += _SMOOTHING * (length - self._mean)
        if length >= 1:
            first = self._token_s == 0.0
            self._token_s += (1.0 if first else _SMOOTHING) * (duration_s / length - self._token_s)
