"""When streams write: many of them share out how many messages a gateway can send."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import time
from collections.abc import Callable

_MESSAGE_S = 40e-6  # until it has been measured
_MAX_SAMPLE_S = 1e-3  # a pause of the whole process is no message
_SAMPLES = 256  # as many messages count as the latest ones
_SHARE = 0.6
_MAX_SHARE = 0.8
_MAX_HOLD_S = 0.04
_TIMER_S = 0.001  # what loops round their timers to


class WritePacer:
    """Gives each stream turns to write; what comes between two of them goes into one message.

    A message costs ten times what a token in it costs. So messages get ``share`` of the event loop's time, by what they
    have taken lately, and streams share that out: with many of them each waits for its next turn, though not for longer
    than ``max_hold_s``. Where messages would take more than ``max_share`` then, streams wait longer all the same, or
    tokens would come in faster than they go out and all be late. Streams that write less often by themselves are never
    held, nor is a first message. Turns are spread over time, so that nothing waits behind a round of writes.

    Event loop only.

    Args:
        share: of the loop's time for messages, where that holds no stream for longer than ``max_hold_s``.
        max_hold_s: longest time between two turns of a stream, where messages take at most ``max_share`` then.
        rng: spreads the turns of streams that begin together.
    """

    def __init__(
        self,
        *,
        share: float = _SHARE,
        max_share: float = _MAX_SHARE,
        max_hold_s: float = _MAX_HOLD_S,
        rng: random.Random | None = None,
    ) -> None:
        self._share = share
        self._max_share = max_share
        self._max_hold_s = max_hold_s
        self._rng = rng or random.Random()
        self._message_s = _MESSAGE_S
        self._round_began_s = 0.0
        self._num_in_round = 0
        self._num_streams = 0
        self._order = itertools.count()
        self._held: list[tuple[float, int, Turns]] = []
        self._timer: asyncio.TimerHandle | None = None

    def join(self, wake: Callable[[], None]) -> Turns:
        """The turns of a new stream; ``wake`` is called when one has come that it was told to wait for."""
        return Turns(self, wake)

    def _interval_s(self) -> float:
        all_s = self._num_streams * self._message_s
        return max(min(all_s / self._share, self._max_hold_s), all_s / self._max_share)

    def _count(self, now: float) -> None:
        """A stream begins to write. Those that are about to as well come before what is called soon."""
        if self._num_in_round == 0:
            self._round_began_s = now
            asyncio.get_running_loop().call_soon(self._end_round)
        self._num_in_round += 1

    def _end_round(self) -> None:
        count, self._num_in_round = self._num_in_round, 0
        sample_s = min((time.monotonic() - self._round_began_s) / count, _MAX_SAMPLE_S)
        self._message_s += (sample_s - self._message_s) * min(count / _SAMPLES, 1.0)

    def _hold(self, turns: Turns) -> None:
        first = self._held[0][0] if self._held else None
        heapq.heappush(self._held, (turns.next_s, next(self._order), turns))
        if first is None or turns.next_s < first:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(self._held[0][0] - time.monotonic(), 0.0)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._wake_due)

    def _wake_due(self) -> None:
        self._timer = None
        held, now = self._held, time.monotonic() + _TIMER_S
        while held and held[0][0] <= now:
            heapq.heappop(held)[2]._come()
        if held:
            self._set_timer()


class Turns:
    """When one stream may write.

    Attributes:
        next_s: its next turn, in monotonic seconds.
    """

    __slots__ = ("_begun", "_ended", "_held", "_pacer", "_wake", "next_s")

    def __init__(self, pacer: WritePacer, wake: Callable[[], None]) -> None:
        self.next_s = 0.0
        self._pacer = pacer
        self._wake = wake
        self._held = False
        self._begun = False
        self._ended = False

    def has_come(self) -> bool:
        """Whether the stream may write now; where not, it is woken when it may."""
        if self._held:
            return False
        if time.monotonic() + _TIMER_S >= self.next_s:
            return True
        self._held = True
        self._pacer._hold(self)
        return False

    def take(self) -> None:
        """The stream writes."""
        pacer, now = self._pacer, time.monotonic()
        pacer._count(now)
        if self._begun:
            interval_s = pacer._interval_s()
            self.next_s = max(self.next_s, now - interval_s) + interval_s
        else:
            self._begun = True
            pacer._num_streams += 1
            self.next_s = now + pacer._rng.random() * pacer._interval_s()

    def end(self) -> None:
        """The stream writes no more, and is not woken again."""
        if self._begun and not self._ended:
            self._pacer._num_streams -= 1
        self._ended = True

    def _come(self) -> None:
        self._held = False
        if not self._ended:
            self._wake()
