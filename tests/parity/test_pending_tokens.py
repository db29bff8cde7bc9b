"""Ids on their way from a pipeline's last stage to its first."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cluster.core.request import SamplingParams
from cluster.core.step import NewSequence, ScheduledSequence, StepInput
from cluster.errors import EngineFault
from cluster.worker.input_batch import InputBatch
from cluster.worker.pending_tokens import PendingTokens


class ScriptedSource:
    """Has the ids of some steps; asking for another fails."""

    def __init__(self) -> None:
        self.ready: dict[int, list[int]] = {}
        self.asked: list[int] = []

    def get(self, step_id: int) -> Sequence[int]:
        self.asked.append(step_id)
        return self.ready.pop(step_id)


class Stage:
    """What the first stage does with a step, less computing it."""

    def __init__(self) -> None:
        self.batch = InputBatch(max_num_seqs=3, max_model_len=32, block_size=4)
        self.source = ScriptedSource()
        self.pending = PendingTokens(self.source, self.batch)
        self.step_id = 0

    def step(
        self, *shares: tuple[int, int, int], new: dict[int, list[int]] | None = None, dropped: tuple[int, ...] = ()
    ) -> list[int]:
        """The ids that the step computes. ``shares``: (sequence, computed, count); all sample."""
        scheduled = tuple(
            ScheduledSequence(
                sequence_id=i,
                num_computed_tokens=computed,
                num_new_tokens=count,
                new_block_ids=tuple(range(8)) if i in (new or {}) else (),
                samples=True,
            )
            for i, computed, count in shares
        )
        step = StepInput(
            step_id=self.step_id,
            new=tuple(
                NewSequence(
                    sequence_id=i,
                    token_ids=token_ids,
                    num_prompt_tokens=len(token_ids),
                    sampling=SamplingParams(seed=0),
                    candidate_index=0,
                    stop_token_ids=(),
                )
                for i, token_ids in (new or {}).items()
            ),
            scheduled=scheduled,
            dropped=dropped,
        )
        self.step_id += 1
        self.batch.apply(step)
        self.pending.settle(scheduled)
        ids = self.batch.arrays(scheduled).tokens_3T[0].tolist()
        self.pending.expect(step.step_id, [self.batch.state(share.sequence_id) for share in scheduled])
        return ids


def test_a_step_waits_for_the_ids_that_it_computes_alone():
    stage = Stage()
    assert stage.step((0, 0, 2), new={0: [5, 6]}) == [5, 6]
    assert stage.step((1, 0, 1), new={1: [7]}) == [7]
    assert stage.source.asked == []
    stage.source.ready[0] = [50]
    assert stage.step((0, 2, 1)) == [50]
    assert stage.source.asked == [0]
    stage.source.ready |= {1: [60], 2: [51]}
    assert stage.step((0, 3, 1), (1, 1, 1)) == [60, 51]  # the arrays go by context
    assert stage.source.asked == [0, 1, 2]


def test_ids_come_in_the_order_of_the_step():
    stage = Stage()
    stage.step((0, 0, 3), (1, 0, 1), new={0: [1, 2, 3], 1: [9]})
    stage.source.ready[0] = [30, 10]
    assert stage.step((1, 1, 1), (0, 3, 1)) == [10, 30]


def test_a_failed_sequence_is_computed_on_a_token_that_exists():
    stage = Stage()
    stage.step((0, 0, 1), new={0: [4]})
    stage.source.ready[0] = [-1]
    assert stage.step((0, 1, 1)) == [0]


def test_a_late_id_does_not_reach_whoever_has_the_row_now():
    stage = Stage()
    stage.step((0, 0, 1), new={0: [4]})
    stage.step((1, 0, 1), new={1: [5]})
    # Sequence 0 ends with its id under way; 2 gets its row, and 0 comes back with all that is known.
    assert stage.step((2, 0, 3), dropped=(0,), new={2: [6, 7, 8]}) == [6, 7, 8]
    assert stage.step((0, 0, 2), new={0: [4, 44]}) == [4, 44]
    stage.source.ready |= {0: [99], 1: [55], 2: [66], 3: [45]}
    assert stage.step((0, 2, 1), (1, 1, 1), (2, 3, 1)) == [55, 45, 66]
    assert stage.batch.state(2).token_ids[:4].tolist() == [6, 7, 8, 66]


def test_a_token_that_nobody_draws_is_a_fault():
    stage = Stage()
    stage.step((0, 0, 1), new={0: [4]})
    stage.source.ready[0] = [3]
    with pytest.raises(EngineFault, match="2 tokens"):
        stage.step((0, 1, 2))
