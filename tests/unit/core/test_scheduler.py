"""What the scheduler does, step by step; ``SchedulerHarness`` checks the invariants of every step on the way."""

from __future__ import annotations

import pytest
from scheduler_harness import SchedulerHarness

from cluster.core.block_manager import BlockManager
from cluster.core.config import SchedulerConfig
from cluster.core.request import FinishReason, Priority, Request
from cluster.core.schedule import Schedule
from cluster.core.scheduler import Scheduler
from cluster.errors import InvalidRequest, Overloaded

P0, P1, P2, P3 = Priority


def shares(schedule: Schedule) -> dict[int, int]:
    return {share.sequence_id: share.num_new_tokens for share in schedule.scheduled}


def create_request(
    request_id: int = 0, num_prompt_tokens: int = 1, max_tokens: int = 1, priority: Priority = P1
) -> Request:
    return Request(request_id=request_id, num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, priority=priority)


def create_scheduler(*, num_blocks: int = 4, block_size: int = 4, max_num_waiting: int = 8) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=8, max_num_waiting=max_num_waiting)
    return Scheduler(config, BlockManager(num_blocks, block_size))


def test_one_request_from_prompt_to_length():
    harness = SchedulerHarness()
    request = harness.add(num_prompt_tokens=5, max_tokens=3)
    assert shares(harness.schedule()) == {request: 5}
    harness.update()
    assert [shares(harness.schedule()), harness.update()] == [{request: 1}, [request]]
    assert [shares(harness.schedule()), harness.update()] == [{request: 1}, [request]]
    assert harness.ended == {request: FinishReason.LENGTH}
    assert harness.blocks.num_free_blocks == harness.blocks.num_blocks


def test_a_stop_wins_over_length():
    harness = SchedulerHarness()
    request = harness.add(max_tokens=1)
    harness.schedule()
    harness.update(lambda request_id: True)
    assert harness.ended == {request: FinishReason.STOP}


def test_a_long_prompt_goes_in_chunks_and_samples_only_at_its_end():
    harness = SchedulerHarness(max_num_batched_tokens=7)
    request = harness.add(num_prompt_tokens=16, max_tokens=2)
    seen = []
    for _ in range(3):
        (share,) = harness.schedule().scheduled
        seen.append((share.num_computed_tokens, share.num_new_tokens, share.samples, len(share.new_block_ids)))
        harness.update()
    assert seen == [(0, 7, False, 4), (7, 7, False, 0), (14, 2, True, 0)]
    assert harness.live[request].num_output_tokens == 1


def test_decodes_come_first_then_partial_prompts_then_those_that_wait():
    harness = SchedulerHarness(num_blocks=40, max_num_batched_tokens=8)
    long = harness.add(num_prompt_tokens=14, max_tokens=9)
    decoding = harness.add(num_prompt_tokens=2, max_tokens=9)
    assert shares(harness.schedule()) == {long: 8}
    harness.update()
    assert list(shares(harness.schedule()).items()) == [(long, 6), (decoding, 2)]
    harness.update()
    partial = harness.add(num_prompt_tokens=20, max_tokens=2)
    assert list(shares(harness.schedule()).items()) == [(long, 1), (decoding, 1), (partial, 6)]
    harness.update()
    waiting = harness.add(num_prompt_tokens=3, max_tokens=2)
    for num_chunk_tokens in (6, 6):
        expected = [(long, 1), (decoding, 1), (partial, num_chunk_tokens)]
        assert list(shares(harness.schedule()).items()) == expected
        harness.update()
    assert list(shares(harness.schedule()).items()) == [(long, 1), (decoding, 1), (partial, 2), (waiting, 3)]
    harness.update()
    harness.drain()


def test_who_does_not_fit_is_not_overtaken():
    harness = SchedulerHarness(num_blocks=6)
    running = harness.add(num_prompt_tokens=8, max_tokens=4)
    harness.schedule()
    large = harness.add(num_prompt_tokens=16, max_tokens=2)
    small = harness.add(num_prompt_tokens=1, max_tokens=2)
    harness.update()
    assert shares(harness.schedule()) == {running: 1}
    harness.cancel(large)
    harness.update()
    assert shares(harness.schedule()) == {running: 1, small: 1}


def test_whoever_runs_keeps_a_spare_block_and_the_next_one_waits_for_it():
    harness = SchedulerHarness(num_blocks=3, block_size=4)
    first = harness.add(num_prompt_tokens=4, max_tokens=3)
    second = harness.add(num_prompt_tokens=5, max_tokens=2)
    assert shares(harness.schedule()) == {first: 4}
    harness.drain()
    assert harness.num_preemptions == 0
    assert harness.ended == {first: FinishReason.LENGTH, second: FinishReason.LENGTH}


def create_full_pool(*priorities: Priority) -> SchedulerHarness:
    """Requests 0, 1, ... that arrived in this order, each in two blocks of a pool that is full but for the spare ones;
    their next token needs a third."""
    harness = SchedulerHarness(
        num_blocks=3 * len(priorities) - 1, block_size=2, max_num_seqs=4, max_num_batched_tokens=16
    )
    for priority in priorities:
        harness.now += 0.1
        harness.add(num_prompt_tokens=4, max_tokens=4, priority=priority)
    harness.schedule()
    harness.update()
    return harness


@pytest.mark.parametrize(
    ("priorities", "victim"),
    [((P1, P1), 1), ((P3, P0), 0), ((P0, P2, P1), 1), ((P2, P1, P2), 2)],
    ids=["latest", "lowest class, though first", "lowest of three", "latest of the lowest class"],
)
def test_lowest_class_then_latest_arrival_is_preempted(priorities: tuple[Priority, ...], victim: int):
    harness = create_full_pool(*priorities)
    assert len(harness.live) == len(priorities) == harness.scheduler.num_running
    schedule = harness.schedule()
    assert schedule.preempted == (victim,)
    assert schedule.dropped == (victim,)
    assert victim not in shares(schedule)
    harness.drain()
    assert set(harness.ended.values()) == {FinishReason.LENGTH}


def test_nobody_is_started_in_the_step_that_preempts():
    harness = create_full_pool(P1, P1)
    small = harness.add(num_prompt_tokens=1, priority=P2)
    schedule = harness.schedule()
    assert (schedule.preempted, schedule.started) == ((1,), ())
    assert harness.blocks.num_free_blocks >= 2
    harness.update()
    harness.drain()
    assert small in harness.ended


def test_the_preempted_starts_over_with_all_its_tokens():
    harness = create_full_pool(P1, P1)
    started = []
    while harness.live:
        schedule = harness.schedule()
        started += [share for share in schedule.scheduled if share.sequence_id in schedule.started]
        harness.update()
    (share,) = started
    assert (share.sequence_id, share.num_computed_tokens, share.num_new_tokens, share.samples) == (1, 0, 5, True)


def test_a_lone_sequence_fills_the_whole_pool():
    harness = SchedulerHarness(num_blocks=3, block_size=4)
    request = harness.add(num_prompt_tokens=1, max_tokens=12)
    harness.drain()
    assert harness.ended == {request: FinishReason.LENGTH}
    assert harness.num_preemptions == 0


def test_plans_ahead_end_at_max_tokens():
    harness = SchedulerHarness(max_in_flight=4)
    request = harness.add(num_prompt_tokens=3, max_tokens=3)
    plans = [harness.schedule() for _ in range(4)]
    assert [shares(plan) for plan in plans] == [{request: 3}, {request: 1}, {request: 1}, {}]
    assert [share.num_computed_tokens for plan in plans for share in plan.scheduled] == [0, 3, 4]
    for _ in range(3):
        harness.update()
    assert harness.ended == {request: FinishReason.LENGTH}


def test_results_that_come_after_the_end_are_passed_over():
    harness = SchedulerHarness(max_in_flight=3)
    stopped, cancelled = harness.add(max_tokens=9), harness.add(max_tokens=9)
    for _ in range(3):
        harness.schedule()
    assert harness.update(lambda request_id: request_id == stopped) == [stopped, cancelled]
    harness.cancel(cancelled)
    assert harness.update() == []
    assert harness.update() == []
    harness.check()
    assert harness.blocks.num_free_blocks == harness.blocks.num_blocks


def test_blocks_freed_with_steps_in_flight_are_given_away_at_once():
    harness = SchedulerHarness(num_blocks=2, max_in_flight=3)
    first = harness.add(num_prompt_tokens=8)
    harness.schedule()
    harness.cancel(first)
    second = harness.add(num_prompt_tokens=8)
    schedule = harness.schedule()
    assert (schedule.dropped, schedule.started) == ((first,), (second,))
    harness.drain()


def test_the_preempted_waits_for_its_samples_under_way_and_keeps_them():
    harness = SchedulerHarness(num_blocks=5, block_size=2, max_in_flight=3)
    first = harness.add(num_prompt_tokens=4, max_tokens=4)
    second = harness.add(num_prompt_tokens=3, max_tokens=4)
    harness.schedule()
    assert harness.schedule().preempted == ()
    third = harness.schedule()
    assert third.preempted == (second,)
    assert harness.live[second].num_placeholders == 2
    harness.update()
    assert second not in harness.schedule().started
    harness.update()
    assert harness.live[second].num_placeholders == 0
    assert harness.live[second].num_output_tokens == 2
    harness.drain()
    assert harness.ended == {first: FinishReason.LENGTH, second: FinishReason.LENGTH}


def test_a_preempted_request_may_end_by_a_sample_under_way():
    harness = SchedulerHarness(num_blocks=5, block_size=2, max_in_flight=3)
    harness.add(num_prompt_tokens=4, max_tokens=4)
    second = harness.add(num_prompt_tokens=3, max_tokens=4)
    for _ in range(3):
        last = harness.schedule()
    assert last.preempted == (second,)
    harness.update(lambda request_id: request_id == second)
    assert harness.ended == {second: FinishReason.STOP}
    harness.drain()


def test_deadlines_end_what_waits_and_what_runs():
    harness = SchedulerHarness(max_num_seqs=1)
    running = harness.add(max_tokens=9, deadline=3.0)
    waiting = harness.add(max_tokens=9, deadline=2.0)
    harness.step()
    harness.now = 2.0
    assert harness.schedule().expired == (waiting,)
    harness.now = 3.0
    schedule = harness.schedule()
    assert (schedule.expired, schedule.scheduled) == ((running,), ())
    assert not harness.scheduler.has_work


def test_drops_wait_for_a_step_that_carries_them():
    harness = SchedulerHarness()
    first = harness.add(max_tokens=9)
    harness.step()
    harness.cancel(first)
    assert harness.schedule() == Schedule(scheduled=(), started=(), dropped=(), preempted=(), expired=())
    harness.add()
    assert harness.schedule().dropped == (first,)


def test_p3_finishes_under_an_endless_flood_of_p0():
    harness = SchedulerHarness(num_blocks=8, max_num_seqs=2)
    old = harness.add(num_prompt_tokens=12, max_tokens=6, priority=P3)
    for _ in range(400):
        for _ in range(2):
            harness.add(num_prompt_tokens=4, max_tokens=6, priority=P0)
        harness.step()
        harness.now += 0.2
        if old in harness.ended:
            break
    assert harness.ended[old] is FinishReason.LENGTH
    harness.drain()


def test_more_than_may_wait_are_refused_all_together():
    scheduler = create_scheduler(max_num_waiting=3)
    scheduler.add(create_request(0), create_request(1))
    with pytest.raises(Overloaded, match="2 sequences wait"):
        scheduler.add(create_request(2), create_request(3))
    assert scheduler.num_waiting == 2
    scheduler.add(create_request(4))
    scheduler.check_integrity()


def test_a_class_may_have_its_share_of_the_queue_whoever_else_waits():
    scheduler = create_scheduler(max_num_waiting=10)
    scheduler.add(*(create_request(index, priority=P3) for index in range(10)))
    scheduler.add(*(create_request(100 + index, priority=P0) for index in range(4)))
    scheduler.add(*(create_request(200 + index, priority=P2) for index in range(2)))
    for priority in (P0, P2, P3):
        with pytest.raises(Overloaded, match=f"1 more came; at most 10 may wait, and of class {priority.name} "):
            scheduler.add(create_request(300, priority=priority))
    with pytest.raises(Overloaded, match="of class P0"):
        scheduler.add(create_request(300, priority=P1), create_request(301, priority=P0))
    scheduler.add(*(create_request(300 + index, priority=P1) for index in range(3)))
    assert scheduler.num_waiting == 19
    # Whoever has ended does not wait, nor does whoever runs.
    scheduler.cancel(102)
    scheduler.add(create_request(400, priority=P0))
    assert 100 in scheduler.schedule(0.0).started
    scheduler.add(create_request(401, priority=P0))
    scheduler.check_integrity()


def test_what_can_never_run_is_refused():
    scheduler = create_scheduler(num_blocks=2, block_size=4)
    scheduler.add(create_request(0, num_prompt_tokens=8, max_tokens=1))
    for request, message in [
        (create_request(0), "already live"),
        (create_request(1, num_prompt_tokens=0), "at least 1"),
        (create_request(1, max_tokens=0), "at least 1"),
        (create_request(1, num_prompt_tokens=8, max_tokens=2), "up to 9 tokens; the whole pool holds 8"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            scheduler.add(request)
    with pytest.raises(InvalidRequest, match="same id"):
        scheduler.add(create_request(5), create_request(5))
    assert scheduler.num_waiting == 1
    scheduler.check_integrity()
