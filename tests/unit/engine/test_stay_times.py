"""Where a candidate's time goes, on a clock that every step moves by a second."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_setup import Clock, create_engine, create_submission, run
from fakes import FakeExecutor

from cluster.core.request import Priority
from cluster.core.step import StepOutput
from cluster.engine.stay import StayTimes


class Ticking(FakeExecutor):
    """A step takes a second."""

    def __init__(self, clock: Clock, **options) -> None:
        super().__init__(**options)
        self.clock = clock

    def collect(self) -> StepOutput:
        self.clock.now += 1
        return super().collect()


def times_of(results, submission_id: int = 0, candidate_index: int = 0) -> StayTimes:
    deltas = results.deltas[submission_id, candidate_index]
    assert all(delta.times is None for delta in deltas[:-1])
    assert deltas[-1].times is not None
    return deltas[-1].times


@pytest.mark.parametrize("emitted", [{}, {0: [3, 4]}])
def test_queue_prefill_and_decode_add_up_to_the_stay(emitted: dict[int, list[int]]):
    clock = Clock()
    engine = create_engine(Ticking(clock), clock=clock, max_num_seqs=1, max_num_batched_tokens=4)
    engine.add(create_submission(0, max_tokens=2))
    engine.add(replace(create_submission(1, [5] * 10, max_tokens=6), emitted=emitted))
    results = run(engine)
    assert times_of(results, 0) == StayTimes(prefill_s=1, decode_s=1)
    num_sampled = 6 - len(emitted.get(0, ()))
    # Two steps of the other's, then 10 or 12 tokens of which a step takes 4.
    assert times_of(results, 1) == StayTimes(queue_s=2, prefill_s=3, decode_s=num_sampled - 1)


def test_time_out_of_the_batch_is_told():
    clock = Clock()
    engine = create_engine(Ticking(clock, num_blocks=6), clock=clock, max_num_seqs=2)
    engine.add(create_submission(0, max_tokens=16, priority=Priority.P0))
    engine.add(create_submission(1, max_tokens=16, priority=Priority.P3))
    results = run(engine)
    assert times_of(results, 0).num_preemptions == 0
    times = times_of(results, 1)
    assert times.num_preemptions == engine.load().num_preemptions > 0
    assert times.queue_s == 0 < times.preempted_s < times.decode_s
    assert times.prefill_s + times.decode_s == clock.now - 100


def test_what_came_complete_has_spent_no_time():
    engine = create_engine()
    engine.add(replace(create_submission(max_tokens=1), emitted={0: [3]}))
    assert times_of(run(engine)) == StayTimes()
