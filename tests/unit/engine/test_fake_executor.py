"""Negative controls: what the engine's tests rely on FakeExecutor to catch, it catches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fakes import FakeExecutor, draw_token

from cluster.core.request import SamplingParams
from cluster.core.step import NewSequence, ParkedBlocks, ScheduledSequence, StepInput

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


def create_step(
    step_id: int, *shares: ScheduledSequence, new: Sequence[NewSequence] = (), dropped=(), **moves
) -> StepInput:
    return StepInput(step_id=step_id, new=tuple(new), scheduled=shares, dropped=tuple(dropped), **moves)


def create_parked(*block_ids: int, sequence_id: int = 0, first_index: int = 0) -> tuple[ParkedBlocks]:
    return (ParkedBlocks(sequence_id=sequence_id, block_ids=block_ids, first_index=first_index),)


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
            create_step(
                1, create_share(1, blocks=(3,)), create_share(start=3, count=1), new=[create_new(1, (5, 6, 8))]
            ),
            "KV of another token at position 2",
        ),
        (create_step(1, create_share(1, start=2, count=1, blocks=(3,)), new=[create_new(1, (5, 7, 8))]), "position 1"),
        (create_step(1, create_share(1, start=2, count=1, blocks=(4,)), new=[create_new(1)]), "position 0"),
        (create_step(1, create_share(start=3, count=1), parked=create_parked(3)), "not dropped"),
        (create_step(1, create_share(start=3, count=1), resumed=create_parked(3)), "not parked"),
    ],
)
def test_a_broken_step_is_caught(step: StepInput, caught: str):
    executor = FakeExecutor(max_in_flight=2)
    executor.submit(START)
    with pytest.raises(AssertionError, match=caught):
        executor.submit(step)


def test_the_kv_of_another_sequence_serves_as_far_as_the_tokens_are_the_same():
    executor = FakeExecutor(max_in_flight=2)
    executor.submit(START)
    executor.submit(
        create_step(1, create_share(1, start=2, count=1, blocks=(4,)), new=[create_new(1)], copies=((3, 4),))
    )


WHOLE = (5, 6, 7, draw_token(1, 0, 3, 100), 8)


def create_parked_run(*steps: StepInput) -> FakeExecutor:
    """Five tokens in blocks 3 and 9 are computed; steps follow."""
    executor = FakeExecutor(max_in_flight=4)
    executor.submit(create_step(0, create_share(count=5, blocks=(3, 9)), new=[create_new(token_ids=WHOLE)]))
    for step in steps:
        executor.submit(step)
    return executor


def create_return(*block_ids: int, **moves) -> StepInput:
    """The sequence of ``create_parked_run`` comes back with all but its last two tokens computed."""
    tokens = (*WHOLE, draw_token(1, 0, 5, 100))
    return create_step(2, create_share(start=4, count=2, blocks=block_ids), new=[create_new(token_ids=tokens)], **moves)


OTHER = create_share(1, count=3, blocks=(9,))


def test_what_is_parked_comes_back_into_other_blocks():
    leave = create_step(1, OTHER, new=[create_new(1)], dropped=[0], parked=create_parked(3, 9))
    executor = create_parked_run(leave)
    assert (executor.held, executor.parked) == ({1}, {0})
    executor.submit(create_return(5, 6, resumed=create_parked(5, 6)))
    assert (executor.held, executor.parked) == ({0, 1}, set())


@pytest.mark.parametrize(
    ("parked", "moves", "caught"),
    [
        ((3, 9), {}, "position 0"),
        ((3, 9), {"resumed": create_parked(6, 5)}, "position 0"),
        ((9, 3), {"resumed": create_parked(5, 6)}, "position 0"),
        ((3, 9), {"resumed": create_parked(5, 6, 7)}, "was not parked"),
        ((3, 9), {"resumed": create_parked(5, 6), "copies": ((9, 5),)}, "position 0"),
        ((3, 9), {"resumed": create_parked(6, first_index=1)}, "position 0"),
    ],
)
def test_blocks_that_come_back_wrong_are_caught(parked: tuple[int, ...], moves: dict, caught: str):
    leave = create_step(1, OTHER, new=[create_new(1, (2, 3, 4))], dropped=[0], parked=create_parked(*parked))
    executor = create_parked_run(leave)
    with pytest.raises(AssertionError, match=caught):
        executor.submit(create_return(5, 6, **moves))


def test_the_parked_are_dropped_too():
    leave = create_step(1, OTHER, new=[create_new(1)], dropped=[0], parked=create_parked(3, 9))
    executor = create_parked_run(leave, create_step(2, create_share(1, start=3, count=1), dropped=[0]))
    assert executor.parked == set()


def test_more_in_flight_than_allowed_is_caught():
    executor = FakeExecutor()
    executor.submit(START)
    with pytest.raises(AssertionError, match="in flight"):
        executor.submit(create_step(1, create_share(start=3, count=1)))


def test_collect_without_a_step_is_caught():
    with pytest.raises(AssertionError, match="nothing to collect"):
        FakeExecutor().collect()
