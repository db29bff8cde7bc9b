"""Copy or compute again: what was measured to take less time, within the host memory there is."""

from __future__ import annotations

import pytest

from cluster.core.parking import Parking
from cluster.core.schedule import Schedule
from cluster.core.step import ParkedBlocks, ScheduledSequence

BLOCK_BYTES = 100


def create_parking(
    num_blocks: int = 100, *, block_copy_s: float | None = None, token_compute_s: float | None = None
) -> Parking:
    parking = Parking(num_blocks * BLOCK_BYTES + BLOCK_BYTES - 1, BLOCK_BYTES)
    if block_copy_s is not None:
        parking.observe(create_schedule(num_parked=4, num_resumed=6), 1.0, 10 * block_copy_s)
    if token_compute_s is not None:
        parking.observe(create_schedule(num_tokens=200), 200 * token_compute_s, 0.0)
    return parking


def create_schedule(
    *, num_tokens: int = 1, num_decodes: int = 0, num_parked: int = 0, num_resumed: int = 0
) -> Schedule:
    scheduled = tuple(
        ScheduledSequence(
            sequence_id=sequence_id, num_computed_tokens=0, num_new_tokens=each, new_block_ids=(), samples=True
        )
        for sequence_id, each in enumerate((num_tokens, *[1] * num_decodes))
    )
    parked, resumed = (
        (ParkedBlocks(sequence_id=9, block_ids=tuple(range(count))),) if count else ()
        for count in (num_parked, num_resumed)
    )
    return Schedule(
        scheduled=scheduled, started=(), dropped=(), preempted=(), expired=(), parked=parked, resumed=resumed
    )


def test_host_memory_is_a_limit_and_is_given_back():
    parking = create_parking(10)
    assert parking.park(1, 6, 24)
    assert not parking.park(2, 5, 20)
    assert parking.park(3, 4, 16)
    assert 1 in parking and 2 not in parking
    assert parking.release(1)
    assert not parking.release(1)
    assert parking.park(2, 5, 20)
    parking.check_integrity({2, 3})


@pytest.mark.parametrize(("max_bytes", "block_bytes"), [(0, BLOCK_BYTES), (99, BLOCK_BYTES), (1000, 0)])
def test_without_memory_or_a_size_nothing_is_parked(max_bytes: int, block_bytes: int):
    assert not Parking(max_bytes, block_bytes).park(1, 1, 16)


def test_what_others_keep_in_the_pool_needs_no_parking():
    assert not create_parking().park(1, 4, 0)


# Ten blocks out and back against 100 tokens.
@pytest.mark.parametrize(
    ("block_copy_s", "token_compute_s", "is_parked"),
    [
        (0.0049, 0.001, True),
        (0.0051, 0.001, False),
        (None, 0.001, True),
        (9.0, None, True),
        (None, None, True),
    ],
)
def test_the_faster_is_chosen(block_copy_s: float | None, token_compute_s: float | None, is_parked: bool):
    parking = create_parking(block_copy_s=block_copy_s, token_compute_s=token_compute_s)
    assert parking.park(1, 10, 100) is is_parked


def test_shared_tokens_make_copying_dear():
    parking = create_parking(block_copy_s=0.001, token_compute_s=0.001)
    assert parking.park(1, 10, 21)
    assert not parking.park(2, 10, 19)


def test_rates_follow_what_is_measured():
    parking = create_parking(block_copy_s=0.01, token_compute_s=0.001)
    assert not parking.park(1, 10, 100)
    for _ in range(20):
        parking.observe(create_schedule(num_parked=10), 0.01, 0.01)
    assert parking.park(1, 10, 100)


def test_decodes_do_not_count_as_prompts():
    parking = create_parking(block_copy_s=0.0051, token_compute_s=0.001)
    for _ in range(20):
        parking.observe(create_schedule(num_tokens=40, num_decodes=30), 10.0, 0.0)
    assert not parking.park(1, 10, 100)


def test_requests_that_have_ended_are_not_parked():
    parking = create_parking()
    parking.park(1, 1, 4)
    with pytest.raises(RuntimeError, match="ended"):
        parking.check_integrity({2})
