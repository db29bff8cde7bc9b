"""Finds stop strings in a text that comes in pieces."""

from __future__ import annotations


class _Pattern:
    """One stop string's automaton (Knuth, Morris and Pratt, 1977): linear in the text, whatever the overlaps."""

    __slots__ = ("failure", "length", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = len(text)
        self.matched = 0  # characters of ``text`` that the input now ends with
        self.failure = [0] * (self.length + 1)
        border = 0
        for index in range(1, self.length):
            while border and text[index] != text[border]:
                border = self.failure[border]
            border += text[index] == text[border]
            self.failure[index + 1] = border

    def advance(self, char: str) -> bool:
        """Takes one character in; whether it completes a match."""
        while self.matched and (self.matched == self.length or char != self.text[self.matched]):
            self.matched = self.failure[self.matched]
        self.matched += char == self.text[self.matched]
        return self.matched == self.length


class StopStrings:
    """Gives text out as soon as it cannot be part of a stop string any more.

    The match that completes first wins; of several that complete together, the longest. Its text is cut out.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._patterns = [_Pattern(text) for text in stop]
        self._first_chars = frozenset(text[0] for text in stop)
        self._held = ""

    def push(self, text: str, *, may_stop: bool) -> tuple[str, bool]:
        """Takes text in.

        Args:
            may_stop: False passes over matches that complete within this text.

        Returns:
            The text that is certain, and whether a stop string was matched; nothing may be pushed after that.
        """
        if not self._held and self._first_chars.isdisjoint(text):
            return text, False  # nothing has begun and nothing begins
        buffer = self._held + text
        for index, char in enumerate(text, start=len(self._held) + 1):
            matches = [pattern.length for pattern in self._patterns if pattern.advance(char)]
            if matches and may_stop:
                self._held = ""
                return buffer[: index - max(matches)], True
        num_held = max(
            pattern.failure[pattern.length] if pattern.matched == pattern.length else pattern.matched
            for pattern in self._patterns
        )
        certain = len(buffer) - num_held
        self._held = buffer[certain:]
        return buffer[:certain], False

    def finish(self) -> str:
        """What was held back: it did not become a match."""
        held, self._held = self._held, ""
        return held
