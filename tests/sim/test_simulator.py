"""Whole runs: what must hold whatever arrives and breaks."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import pytest
from sim_setup import create_arrivals, create_replicas, create_simulator, create_step_times

from cluster.core.block_manager import BlockManager
from cluster.core.config import SchedulerConfig
from cluster.core.request import FinishReason
from cluster.core.schedule import Schedule
from cluster.core.scheduler import Scheduler
from cluster.sim.baselines import PrefillFirst
from cluster.sim.latency import StepLoad
from cluster.sim.recording import Ending, Recording
from cluster.sim.simulator import Crash, Simulator, Stall
from cluster.sim.workload import Arrival

FAULTS = [
    Stall(at_s=5.0, replica_index=0, duration_s=3.0),
    Crash(at_s=20.0, replica_index=1, down_s=10.0),
    Crash(at_s=24.0, replica_index=0, down_s=4.0),  # nobody is there for a while
    Stall(at_s=60.0, replica_index=1, duration_s=0.5),
]


def test_one_request_takes_the_time_of_its_steps():
    times = create_step_times()
    recording = create_simulator(step_times=times).run([Arrival(at_s=1.5, num_prompt_tokens=70, num_output_tokens=3)])
    (record,) = recording.records
    chunk = times.step_s(
        StepLoad(num_samples=0, sample_context=0, num_prefill_tokens=64, prefill_attended=32.5)
    )  # the largest step
    rest = times.step_s(StepLoad(num_samples=1, sample_context=70, num_prefill_tokens=5, prefill_attended=67))
    decodes = [
        times.step_s(StepLoad(num_samples=1, sample_context=context, num_prefill_tokens=0, prefill_attended=0))
        for context in (71, 72)
    ]
    assert record.first_token_s == pytest.approx(1.5 + chunk + rest)
    assert list(recording.token_gaps_s) == pytest.approx(decodes)
    assert (record.ending, record.ended_s) == (Ending.FINISHED, recording.token_times_s[-1])


@pytest.mark.parametrize("policy", [Scheduler, PrefillFirst])
@pytest.mark.parametrize("num_blocks", [16, 64])  # with 16, requests preempt each other
def test_every_request_gets_all_its_tokens_and_ends_once(policy, num_blocks):
    simulator = create_simulator(policy=policy, num_blocks=num_blocks)
    records = simulator.run(create_arrivals(rate=2.0)).records
    assert {record.ending for record in records} == {Ending.FINISHED}
    assert [r.num_output_tokens for r in records] == [r.arrival.num_output_tokens for r in records]


def test_what_breaks_ends_the_requests_that_it_had_and_no_others():
    simulator = create_simulator(2, num_blocks=24)
    recording = simulator.run(create_arrivals(400, rate=3.0, impatient=True), FAULTS)
    endings = {record.ending for record in recording.records}
    assert endings == set(Ending)  # each happened
    for record in recording.records:
        if record.ending is Ending.LOST:
            assert record.ended_s in {20.0, 24.0}
        if record.ending is Ending.EXPIRED:
            assert record.ended_s >= record.arrival.at_s + record.arrival.deadline_s
        if record.ending is Ending.CANCELLED:
            assert record.ended_s == record.arrival.at_s + record.arrival.leaves_after_s
    assert any(r.ending is Ending.FINISHED and r.arrival.at_s > 40 for r in recording.records), "nobody came back"


def test_time_goes_on():
    simulator = create_simulator(2)
    recording = simulator.run(create_arrivals(impatient=True), FAULTS)
    assert list(recording.token_times_s) == sorted(recording.token_times_s)
    assert min(recording.token_gaps_s) > 0
    assert simulator.now >= max(record.ended_s for record in recording.records)


def test_a_stall_is_felt_by_those_who_wait_for_the_step():
    arrival = Arrival(at_s=0.0, num_prompt_tokens=8, num_output_tokens=5)
    smooth = create_simulator().run([arrival]).token_gaps_s
    stalled = create_simulator().run([arrival], [Stall(at_s=0.01, replica_index=0, duration_s=2.5)]).token_gaps_s
    assert list(stalled) == pytest.approx([smooth[0] + 2.5, *smooth[1:]])


def digest(*, seed: int = 0, arrivals_seed: int = 0, faults: Collection[Stall | Crash] = FAULTS) -> str:
    simulator = create_simulator(2, seed=seed)
    simulator.run(create_arrivals(impatient=True, seed=arrivals_seed), faults)
    return simulator.digest()


def test_the_same_seeds_give_the_same_run_and_others_another():
    assert digest() == digest()
    assert len({digest(), digest(seed=1), digest(arrivals_seed=1), digest(faults=FAULTS[1:])}) == 4


def test_what_a_pool_can_never_hold_is_refused():
    simulator = create_simulator(num_blocks=4)
    (record,) = simulator.run([Arrival(at_s=0.0, num_prompt_tokens=80, num_output_tokens=1)]).records
    assert record.ending is Ending.REFUSED


def test_requests_go_to_the_replica_with_the_least_to_do():
    replicas = create_replicas(2)
    simulator = Simulator(replicas, random.Random(0))
    simulator.run([Arrival(at_s=0.0, num_prompt_tokens=8, num_output_tokens=9)] * 6)
    solo = create_simulator()
    solo.run([Arrival(at_s=0.0, num_prompt_tokens=8, num_output_tokens=9)] * 3)
    assert simulator.now == pytest.approx(solo.now)


class _Broken(Scheduler):
    """A scheduler with a fault of its own."""

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager, fault: str) -> None:
        super().__init__(config, block_manager)
        self._fault = fault
        self._last: list[tuple[int, FinishReason]] = []

    def schedule(self, now: float) -> Schedule:
        if self._fault == "idles" and now > 1:
            return Schedule(scheduled=(), started=(), dropped=(), preempted=(), expired=())
        return super().schedule(now)

    def update(self, schedule: Schedule, stopped: Collection[int], **observed: Any) -> list[tuple[int, FinishReason]]:
        finished = super().update(schedule, stopped, **observed)
        if self._fault == "forgets":
            return []
        if self._fault == "cuts" and not finished:
            request_id = schedule.scheduled[0].sequence_id
            self.cancel(request_id)
            return [(request_id, FinishReason.STOP)]
        return finished


@pytest.mark.parametrize(
    ("fault", "message"),
    [("idles", "does none of it"), ("forgets", "does not know what it has to do"), ("cuts", "finished with")],
)
def test_a_scheduler_that_is_broken_is_found_out(fault, message):
    simulator = create_simulator(policy=lambda config, blocks: _Broken(config, blocks, fault))
    with pytest.raises(RuntimeError, match=message):
        simulator.run(create_arrivals(20))


def test_a_request_that_ends_twice_or_never_is_found_out():
    recording = Recording()
    request_id = recording.arrive(Arrival(at_s=0.0, num_prompt_tokens=1, num_output_tokens=1))
    with pytest.raises(RuntimeError, match="never ended"):
        recording.check_all_ended()
    recording.end(1.0, request_id, Ending.CANCELLED)
    with pytest.raises(RuntimeError, match="was cancelled before"):
        recording.end(2.0, request_id, Ending.LOST)
