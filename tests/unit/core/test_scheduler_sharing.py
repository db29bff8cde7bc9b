"""KV that is not computed twice: found by its hash, taken over from a sibling, or kept in host memory."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_harness import SchedulerHarness

from cluster.core.request import FinishReason, Priority
from cluster.core.schedule import Schedule

P0, P1, P2, P3 = Priority


def create_harness(**limits: Any) -> SchedulerHarness:
    return SchedulerHarness(**{"num_blocks": 64, "block_size": 4, "max_num_batched_tokens": 64, **limits})


def cached(schedule: Schedule) -> dict[int, int]:
    return dict(zip(schedule.started, schedule.num_cached_tokens, strict=True))


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_cached_tokens"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (14, 12), (20, 12)]
)
def test_a_prompt_that_begins_like_another_computes_the_rest(num_prompt_tokens: int, num_cached_tokens: int):
    harness = create_harness()
    harness.add(num_prompt_tokens=14, prompt=1)
    harness.step()
    second = harness.add(num_prompt_tokens=num_prompt_tokens, prompt=1)
    schedule = harness.schedule()
    assert cached(schedule) == {second: num_cached_tokens}
    assert schedule.scheduled[0].num_computed_tokens == num_cached_tokens
    assert harness.scheduler.num_queued_tokens == 1  # the sample under way
    harness.update()
    harness.drain()


def test_other_prompts_and_those_without_hashes_share_nothing():
    harness = create_harness()
    harness.add(num_prompt_tokens=14, prompt=1)
    harness.step()
    harness.add(num_prompt_tokens=14, prompt=2)
    harness.add(num_prompt_tokens=14)
    assert harness.schedule().num_cached_tokens == (0, 0)


def test_what_a_plan_computes_is_found_from_the_next_plan_on():
    harness = create_harness(max_num_seqs=8, max_in_flight=2)
    first, second = (harness.add(num_prompt_tokens=9, max_tokens=3, prompt=1) for _ in range(2))
    assert cached(harness.schedule()) == {first: 0, second: 0}
    third = harness.add(num_prompt_tokens=9, max_tokens=3, prompt=1)
    assert cached(harness.schedule()) == {third: 8}
    harness.drain()


def test_a_prompt_is_found_as_far_as_it_has_come():
    harness = create_harness(max_num_batched_tokens=10)
    harness.add(num_prompt_tokens=40, max_tokens=3, prompt=1)
    harness.step()
    second = harness.add(num_prompt_tokens=40, max_tokens=1, priority=P0, prompt=1)
    assert cached(harness.schedule()) == {second: 8}
    harness.update()
    harness.drain()


def test_sampled_tokens_are_found_once_their_blocks_are_full():
    harness = create_harness()
    harness.add(num_prompt_tokens=6, max_tokens=7, prompt=1, own=0)
    for _ in range(7):
        harness.step()
    assert not harness.live
    # The last of its 13 tokens was never computed: three full blocks. The same tokens come as a prompt's.
    second = harness.add(num_prompt_tokens=15, prompt=1, own=0, num_copied_tokens=9)
    assert cached(harness.schedule()) == {second: 12}
    harness.update()
    harness.drain()


def test_the_preempted_finds_its_own_blocks():
    harness = SchedulerHarness(num_blocks=9, block_size=4, max_num_seqs=1, max_num_batched_tokens=32)
    old = harness.add(num_prompt_tokens=10, max_tokens=8, priority=P3, prompt=1)
    for _ in range(4):
        harness.step()
    harness.add(num_prompt_tokens=2, max_tokens=1, priority=P0)
    assert harness.schedule().preempted == (old,)
    harness.update()
    # Ten of the prompt and four samples, the last of which was not computed: three full blocks.
    assert cached(harness.schedule()) == {old: 12}
    harness.drain()


def test_what_is_computed_again_in_chunks_is_found_again():
    harness = SchedulerHarness(num_blocks=4, block_size=4, max_num_seqs=1, max_num_batched_tokens=6)
    old = harness.add(num_prompt_tokens=4, max_tokens=11, priority=P3, prompt=1, own=0)
    for _ in range(9):
        harness.step()
    urgent = harness.add(num_prompt_tokens=16, priority=P0)  # leaves nothing of it in the pool
    while urgent in harness.live:
        harness.step()
    schedule = harness.schedule()
    assert (schedule.started, schedule.num_cached_tokens) == ((old,), (0,))
    while harness.live[old].num_output_tokens == 9:
        harness.step()
    harness.cancel(old)
    same = harness.add(num_prompt_tokens=13, prompt=1, own=0, num_copied_tokens=9)
    assert cached(harness.schedule()) == {same: 12}


def test_siblings_wait_for_the_first_and_fork():
    harness = create_harness(max_num_seqs=8, max_num_batched_tokens=8)
    first = harness.add(num_prompt_tokens=14, max_tokens=5, n=3)
    for num_tokens in (8, 6):
        assert [share.num_new_tokens for share in harness.schedule().scheduled] == [num_tokens]
        harness.update()
    schedule = harness.schedule()
    assert cached(schedule) == {first + 1: 13, first + 2: 13}
    assert [share.num_new_tokens for share in schedule.scheduled] == [1, 1, 1]
    (source, one), (other_source, two) = schedule.copies
    table = harness.blocks.block_table(first)
    assert source == other_source == table[3]
    assert harness.blocks.block_table(first + 1) == (*table[:3], one)
    assert harness.blocks.block_table(first + 2) == (*table[:3], two)
    harness.update()
    harness.drain()


def test_a_prompt_of_whole_blocks_needs_no_copy_but_of_its_last_block():
    harness = create_harness(max_num_seqs=8)
    harness.add(num_prompt_tokens=9, max_tokens=2, n=2)  # the last token begins a block
    harness.step()
    schedule = harness.schedule()
    assert (len(schedule.started), schedule.copies) == (1, ())
    harness.update()
    harness.drain()


def test_siblings_fork_while_the_prompt_is_under_way():
    harness = create_harness(max_num_seqs=8, max_in_flight=3)
    first = harness.add(num_prompt_tokens=6, max_tokens=4, n=3)
    assert harness.schedule().started == (first,)
    assert harness.schedule().started == (first + 1, first + 2)
    harness.drain()
    assert set(harness.ended.values()) == {FinishReason.LENGTH}


def test_siblings_whose_first_has_ended_find_its_blocks():
    harness = create_harness(max_num_seqs=1)
    first = harness.add(num_prompt_tokens=10, max_tokens=1, n=2, prompt=1)
    harness.step()
    assert cached(harness.schedule()) == {first + 1: 8}
    harness.update()
    harness.drain()


@pytest.mark.parametrize("expires", [False, True])
def test_another_takes_over_when_the_first_ends_before_its_prompt_is_computed(expires: bool):
    harness = create_harness(max_num_seqs=8, max_num_batched_tokens=8)
    first = harness.add(num_prompt_tokens=20, max_tokens=3, n=4)
    harness.step()
    harness.cancel(first)
    if expires:
        harness.cancel(first + 2)  # who is held back may end, too
    assert harness.schedule().started == (first + 1,)
    harness.update()
    harness.drain()
    assert harness.ended[first + 3] is FinishReason.LENGTH


def test_the_first_is_waited_for_though_it_is_preempted():
    harness = create_harness(max_num_seqs=1, max_num_batched_tokens=4)
    first = harness.add(num_prompt_tokens=10, max_tokens=2, priority=P3, n=2)
    harness.step()
    urgent = harness.add(num_prompt_tokens=4, max_tokens=1, priority=P0)
    assert harness.schedule().preempted == (first,)
    harness.update()
    assert harness.schedule().started == (first,)
    harness.update()
    assert urgent in harness.ended
    harness.drain()


def create_parked(num_park_blocks: int = 16, **limits: Any) -> tuple[SchedulerHarness, Schedule]:
    """A request with 13 tokens, 12 of them computed, that a P0 has just pushed aside."""
    harness = create_harness(max_num_seqs=1, num_park_blocks=num_park_blocks, **limits)
    old = harness.add(num_prompt_tokens=10, max_tokens=8, priority=P3)
    for _ in range(3):
        harness.step()
    harness.add(num_prompt_tokens=2, max_tokens=1, priority=P0)
    schedule = harness.schedule()
    assert schedule.preempted == (old,)
    return harness, schedule


def test_the_parked_resumes_with_all_it_had():
    harness, schedule = create_parked()
    (parked,) = schedule.parked
    assert (parked.sequence_id, len(parked.block_ids), parked.first_index) == (0, 3, 0)
    harness.update()
    schedule = harness.schedule()
    (share,) = schedule.scheduled
    assert (share.num_computed_tokens, share.num_new_tokens, schedule.num_cached_tokens) == (12, 1, (0,))
    (resumed,) = schedule.resumed
    assert (resumed.sequence_id, resumed.block_ids, resumed.first_index) == (0, share.new_block_ids[:3], 0)
    assert len(share.new_block_ids) == 4
    harness.drain()


def test_blocks_that_are_found_again_are_not_copied_back():
    harness = create_harness(max_num_seqs=1, num_park_blocks=16)
    old = harness.add(num_prompt_tokens=10, max_tokens=8, priority=P3, prompt=1)
    for _ in range(2):
        harness.step()
    harness.add(num_prompt_tokens=2, max_tokens=1, priority=P0)
    assert [blocks.sequence_id for blocks in harness.schedule().parked] == [old]
    harness.update()
    (resumed,) = harness.schedule().resumed
    assert (resumed.first_index, len(resumed.block_ids)) == (2, 1)
    harness.drain()


@pytest.mark.parametrize("num_park_blocks", [0, 2])
def test_what_host_memory_does_not_hold_is_computed_again(num_park_blocks: int):
    harness, schedule = create_parked(num_park_blocks)
    assert schedule.parked == ()
    harness.update()
    (share,) = harness.schedule().scheduled
    assert (share.num_computed_tokens, share.num_new_tokens) == (0, 13)
    harness.drain()


def test_the_copy_of_a_parked_request_that_ends_is_dropped():
    harness, _ = create_parked()
    harness.update()
    assert set(harness.kv.parked) == {0}
    harness.cancel(0)
    harness.add()
    assert harness.schedule().dropped == (1, 0)
    assert not harness.kv.parked
    harness.update()
    harness.drain()


def test_blocks_of_a_request_that_ends_before_a_step_parks_them_are_not_parked():
    harness = SchedulerHarness(num_blocks=4, block_size=2, max_in_flight=4, num_park_blocks=8)
    harness.add(num_prompt_tokens=4)
    second = harness.add(num_prompt_tokens=2, max_tokens=6)
    for _ in range(3):
        harness.schedule()
    # The first waits for its last token, and the second gives up its own blocks: there is nothing to run.
    schedule = harness.schedule()
    assert (schedule.preempted, schedule.scheduled, schedule.parked) == ((second,), (), ())
    harness.cancel(second)
    harness.add()
    schedule = harness.schedule()
    assert second in schedule.dropped
    assert schedule.parked == ()
    harness.drain()


def test_host_memory_is_given_back():
    harness = create_harness(max_num_seqs=1, num_park_blocks=3)
    old = harness.add(num_prompt_tokens=8, max_tokens=4, priority=P3)
    harness.step()
    harness.step()
    for _ in range(2):
        harness.add(num_prompt_tokens=2, max_tokens=1, priority=P0)
        assert [blocks.sequence_id for blocks in harness.schedule().parked] == [old]
        harness.update()
        assert [blocks.sequence_id for blocks in harness.schedule().resumed] == [old]
        harness.update()
    harness.drain()


def test_blocks_are_parked_only_where_copying_is_measured_to_be_faster():
    for copy_s, is_parked in ((0.001, True), (10.0, False)):
        harness = create_harness(max_num_seqs=1, num_park_blocks=16)
        old = harness.add(num_prompt_tokens=30, max_tokens=9, priority=P3)
        for round_ in range(2):
            harness.schedule()
            harness.update(duration_s=0.1, parking_s=0.0)
            harness.add(num_prompt_tokens=2, max_tokens=1, priority=P0)
            schedule = harness.schedule()
            assert schedule.preempted == (old,)
            assert bool(schedule.parked) == (is_parked or round_ == 0)  # not measured the first time
            harness.update(duration_s=copy_s + 0.1, parking_s=copy_s)
            harness.schedule()
            harness.update(duration_s=copy_s + 0.1, parking_s=copy_s)
        harness.drain()
