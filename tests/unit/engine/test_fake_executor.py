"""Negative controls: what the engine's tests rely on FakeExecutor to catch, it catches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fakes import FakeExecutor

from cluster.core.request import SamplingParams
from cluster.core.step import NewSequence, ScheduledSequence, StepInput

SAMPLING = SamplingParams(seed=1)


def create_new(sequence_id: int = 0, token_ids: Sequence[int] = (5, 6, 7)) -> NewSequence:
    return NewSequence(
        sequence_id=sequence_id,
        token_ids=list(token_ids),
        num_prompt_tokens=3,
        sampling=SAMPLING,
        candidate_index=0,
        stop_token_ids=(),
    )


def create_share(
    sequence_id: int = 0, start: int = 0, count: int = 3, blocks: tuple[int, ...] = (), *, samples: bool = True
) -> ScheduledSequence:
    return ScheduledSequence(
        sequence_id=sequence_id, num_computed_tokens=start, num_new_tokens=count, new_block_ids=blocks, samples=samples
    )


def create_step(step_id: int, *shares: ScheduledSequence, new: Sequence[NewSequence] = (), dropped=()) -> StepInput:
    return StepInput(step_id=step_id, new=tuple(new), scheduled=shares, dropped=tuple(dropped))


START = create_step(0, create_share(blocks=(3,)), new=[create_new()])


@pytest.mark.parametrize(
    ("step", "caught"),
    [
        (create_step(1), "an empty step"),
        (create_step(2, create_share(start=3, count=1)), "numbered in order"),
        (create_step(1, create_share(start=2, count=2)), "do not continue"),
        (create_step(1, create_share(start=3, count=2)), "past the known tokens"),
        (create_step(1, create_share(start=3, count=1, samples=False)), "last known token"),
        (create_step(1, create_share(start=3, count=1), create_share(start=3, count=1)), "twice in a step"),
        (create_step(1, create_share(blocks=(4,)), new=[create_new()]), "is new, but held"),
        (create_step(1, create_share(start=3, count=1), dropped=[8]), "dropped, but not held"),
        (create_step(1, create_share(1, count=3), new=[create_new(1)]), "table is too short"),
        (create_step(1, create_share(1, blocks=(16,)), new=[create_new(1)]), "outside the pool"),
        (create_step(1, create_share(blocks=(4,)), new=[create_new()], dropped=[0]), "without all its tokens"),
        (
            create_step(1, create_share(1, blocks=(3,)), create_share(start=3, count=1), new=[create_new(1)]),
            "KV of another token",
        ),
    ],
)
def test_a_broken_step_is_caught(step: StepInput, caught: str):
    executor = FakeExecutor(max_in_flight=2)
    executor.submit(START)
    with pytest.raises(AssertionError, match=caught):
        executor.submit(step)


def test_more_in_flight_than_allowed_is_caught():
    executor = FakeExecutor()
    executor.submit(START)
    with pytest.raises(AssertionError, match="in flight"):
        executor.submit(create_step(1, create_share(start=3, count=1)))


def test_collect_without_a_step_is_caught():
    with pytest.raises(AssertionError, match="nothing to collect"):
        FakeExecutor().collect()
