"""Tokens that a pipeline's last stage has drawn, or is about to, and its first stage does not have yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.core.step import ScheduledSequence, StepInput
from cluster.worker.input_batch import InputBatch, SequenceState
from cluster.worker.token_feed import TokenSource


@dataclass(frozen=True, slots=True)
class Arrival:
    """A token that has come: id ``token_id`` at ``position`` of the sequence."""

    state: SequenceState
    position: int
    token_id: int


class PendingTokens:
    """Waits for tokens only when a step is to compute them, so that steps are under way while others draw.

    Args:
        source: brings the ids.
        batch: holds their places, and gets the ids.
    """

    def __init__(self, source: TokenSource, batch: InputBatch) -> None:
        self._source = source
        self._batch = batch
        self._steps: deque[tuple[int, list[tuple[SequenceState, int]]]] = deque()
        self._awaited: dict[int, tuple[int, SequenceState]] = {}  # by sequence: the step that draws its newest token

    def expect(self, step_id: int, states: Iterable[SequenceState]) -> None:
        """The step draws the next token of each of these sequences, at least one, in the order of
        ``StepInput.scheduled``."""
        places = []
        for state in states:
            places.append((state, state.num_tokens))
            self._batch.append(state, 0)
            self._awaited[state.sequence_id] = step_id, state
        self._steps.append((step_id, places))

    def settle(self, scheduled: Sequence[ScheduledSequence]) -> list[Arrival]:
        """Waits for the tokens that this step computes. Gives all that came, those of earlier steps included, but for
        sequences that have ended since.

        Raises:
            PeerLost: the last stage did not send them in time.
        """
        awaited = (self._awaited.get(share.sequence_id) for share in scheduled)
        # A sequence that was dropped meanwhile, and has come back, knows its tokens.
        wanted = max((step_id for step_id, state in filter(None, awaited) if self._batch.holds(state)), default=-1)
        arrivals = []
        while self._steps and self._steps[0][0] <= wanted:
            step_id, places = self._steps.popleft()
            for (state, position), token_id in zip(places, self._source.get(step_id), strict=True):
                if self._awaited.get(state.sequence_id, (-1,))[0] == step_id:
                    del self._awaited[state.sequence_id]
                if self._batch.holds(state):
                    # A sequence that failed may have been planned ahead: it is computed on a token that exists.
                    arrivals.append(Arrival(state, position, max(token_id, 0)))
        for arrival in arrivals:
            arrival.state.token_ids[arrival.position] = arrival.token_id
        return arrivals


def hold_places(step: StepInput, batch: InputBatch, pending: PendingTokens | None) -> None:
    """Of the tokens that the last stage draws in this step, on a stage that does not.

    Args:
        pending: brings the ids later; None: this stage never reads them.
    """
    states = [batch.state(share.sequence_id) for share in step.scheduled if share.samples]
    if pending is not None and states:
        pending.expect(step.step_id, states)
    else:
        for state in states:
            batch.append(state, 0)
