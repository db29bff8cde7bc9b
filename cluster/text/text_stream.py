"""A candidate's text as it grows: detokenized, cut at its stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cluster.text.detokenizer import create_detokenizer
from cluster.text.stop_strings import StopStrings
from cluster.text.tokenizer import Tokenizer


class TextDelta(NamedTuple):
    """Text that is certain now.

    Attributes:
        text: appended to the candidate's text.
        offset: where it begins there, in code points.
        stopped: a stop string was matched; nothing comes after this.
        num_tokens: tokens taken in by this call, up to and including the one that completed the match.
    """

    text: str
    offset: int
    stopped: bool
    num_tokens: int


class TextStream:
    """Tokens in, text out. Special tokens have no text.

    Args:
        tokenizer: the model's.
        stop: stop strings; a match is cut out.
        min_tokens: a match that completes before this many tokens is passed over, for good.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), *, min_tokens: int = 0) -> None:
        self._detokenizer = create_detokenizer(tokenizer)
        self._stop = StopStrings(stop)
        self._may_stop = bool(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_chars = 0

    @property
    def may_stop(self) -> bool:
        """Whether there are stop strings."""
        return self._may_stop

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Takes tokens in, in order. Not to be called after ``stopped`` or ``finish``."""
        if not self._may_stop:
            self._num_tokens += len(token_ids)
            return self._delta(self._detokenizer.push_all(token_ids), stopped=False, num_tokens=len(token_ids))
        pieces: list[str] = []
        for count, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            text, stopped = self._stop.push(
                self._detokenizer.push(token_id), may_stop=self._num_tokens >= self._min_tokens
            )
            pieces.append(text)
            if stopped:
                return self._delta("".join(pieces), stopped=True, num_tokens=count)
        return self._delta("".join(pieces), stopped=False, num_tokens=len(token_ids))

    def finish(self) -> TextDelta:
        """Gives out what was held back. The end of the text completes no stop string."""
        text, _ = self._stop.push(self._detokenizer.finish(), may_stop=False)
        return self._delta(text + self._stop.finish(), stopped=False, num_tokens=0)

    def _delta(self, text: str, *, stopped: bool, num_tokens: int) -> TextDelta:
        offset, self._num_chars = self._num_chars, self._num_chars + len(text)
        return TextDelta(text=text, offset=offset, stopped=stopped, num_tokens=num_tokens)
