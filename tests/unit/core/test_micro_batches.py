"""Decodes in the steps of a pipeline; the walks of ``test_scheduler_machine`` hold the rule at random."""

from __future__ import annotations

from collections import Counter

import pytest
from scheduler_harness import SchedulerHarness

from cluster.core.request import FinishReason, Priority
from cluster.core.schedule import Schedule


def create_harness(num_stages: int, num_sequences: int = 0, **limits: int) -> SchedulerHarness:
    """Sequences of one prompt token each that want 40 more, and steps in flight as an executor of stages has them."""
    harness = SchedulerHarness(
        **{
            "num_blocks": 256,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 32,
            "num_stages": num_stages,
            "max_in_flight": num_stages + 1,
            **limits,
        }
    )
    for _ in range(num_sequences):
        harness.add(num_prompt_tokens=1, max_tokens=40)
    return harness


def ids(schedule: Schedule) -> list[int]:
    return [share.sequence_id for share in schedule.scheduled]


def sizes(harness: SchedulerHarness, num_steps: int) -> list[int]:
    """Of the steps that are done next."""
    seen = []
    for _ in range(num_steps):
        harness.step()
        seen.append(len(harness.in_flight[0].scheduled))
    return seen


@pytest.mark.parametrize(("num_stages", "expected"), [(1, {8}), (2, {4}), (4, {2}), (8, {1})])
def test_all_that_decode_fall_apart_into_as_many_micro_batches_as_there_are_stages(num_stages: int, expected: set[int]):
    harness = create_harness(num_stages, 8)
    for _ in range(2 * num_stages):
        harness.step()
    assert set(sizes(harness, 3 * num_stages)) == expected


def test_a_sequence_comes_back_with_the_step_that_follows_once_round():
    harness = create_harness(4, 8)
    for _ in range(12):
        harness.step()
    rounds = [ids(schedule) for schedule in harness.in_flight]
    for _ in range(4):
        harness.step()
        rounds.append(ids(harness.in_flight[-1]))
    assert rounds[4:8] == rounds[:4]
    assert sorted(i for batch in rounds[:4] for i in batch) == list(range(8))


def test_a_step_may_be_planned_while_the_newest_token_is_under_way():
    harness = create_harness(2)
    first, second = harness.add(max_tokens=9), harness.add(max_tokens=9)
    assert ids(harness.schedule()) == [first, second]
    harness.update()
    assert [ids(harness.schedule()) for _ in range(3)] == [[first], [second], [first]]
    assert harness.live[first].num_placeholders == 2


def test_a_lone_sequence_is_planned_again_when_its_token_is_there():
    harness = create_harness(4)
    only = harness.add(max_tokens=3)
    for _ in range(3):
        assert ids(harness.schedule()) == [only]
        assert ids(harness.schedule()) == [], "the step would wait in the first stage, and others behind it"
        assert harness.update() == [only]
    assert harness.ended == {only: FinishReason.LENGTH}


def prompt_chunks(harness: SchedulerHarness, num_steps: int) -> list[int]:
    """Prompt tokens of the steps that are planned next, all of them ahead."""
    return [sum(share.num_new_tokens for share in harness.schedule().scheduled) for _ in range(num_steps)]


def test_chunks_of_a_prompt_follow_each_other():
    harness = create_harness(4, block_size=16)
    prompt = harness.add(num_prompt_tokens=45, max_tokens=2)
    assert prompt_chunks(harness, 4) == [16, 16, 13, 0]
    harness.drain()
    assert harness.ended == {prompt: FinishReason.LENGTH}


@pytest.mark.parametrize(
    ("num_stages", "expected"), [(1, [160, 0, 0]), (2, [40, 30, 23]), (4, [20, 18, 16]), (16, [8, 8, 8])]
)
def test_a_prompt_is_spread_over_two_rounds_of_the_stages(num_stages: int, expected: list[int]):
    harness = create_harness(num_stages, max_num_batched_tokens=1024, block_size=8)
    harness.add(num_prompt_tokens=160, max_tokens=1)
    assert prompt_chunks(harness, 3) == expected
    harness.drain()


def test_many_prompts_fill_whole_steps():
    harness = create_harness(4, max_num_batched_tokens=32, num_blocks=1024)
    for _ in range(16):
        harness.add(num_prompt_tokens=60, max_tokens=2)
    assert prompt_chunks(harness, 5) == [32] * 5
    harness.drain()


@pytest.mark.parametrize("limits", [{"max_num_seqs": 1}, {"num_blocks": 12}], ids=["places", "blocks"])
def test_prompts_that_find_no_room_yet_do_not_make_the_chunks_larger(limits: dict[str, int]):
    harness = create_harness(2, max_num_batched_tokens=64, **limits)
    for _ in range(16):
        harness.add(num_prompt_tokens=40, max_tokens=2)
    assert prompt_chunks(harness, 2) == [10, 8]
    harness.drain()


def test_sequences_that_end_together_leave_even_micro_batches():
    harness = create_harness(4, 16)
    for _ in range(12):
        harness.step()
    for request_id in [*ids(harness.in_flight[0]), *ids(harness.in_flight[1])]:
        harness.cancel(request_id)
    for _ in range(8):
        harness.step()
    assert set(sizes(harness, 8)) == {2}


def test_those_that_start_together_are_spread():
    harness = create_harness(4, 2)
    for _ in range(8):
        harness.step()
    for _ in range(6):
        harness.add(max_tokens=40)
    for _ in range(10):
        harness.step()
    assert set(sizes(harness, 8)) == {2}


def test_nobody_decodes_twice_while_another_waits():
    harness = create_harness(4, 11)
    for _ in range(20):
        harness.step()
    counts = Counter(request_id for _ in range(44) for request_id in harness.step())
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_p0_takes_the_place_of_one_that_is_not_in_the_step():
    harness = create_harness(4, max_num_seqs=4, max_num_batched_tokens=4, num_blocks=64)
    for _ in range(4):
        harness.add(max_tokens=40, priority=Priority.P3)
    for _ in range(12):
        harness.step()
    urgent = harness.add(num_prompt_tokens=3, max_tokens=2, priority=Priority.P0)
    harness.update()
    schedule = harness.schedule()
    assert schedule.started == (urgent,)
    assert schedule.preempted == (3,)
    harness.drain()
