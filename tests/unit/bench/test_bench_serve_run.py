"""A load on a target that is made up: what is sent when, and what is written down."""

import asyncio
import time

import pytest

from cluster.bench.serve.arrivals import Closed, Rate
from cluster.bench.serve.load import DrawnLoad, Lengths
from cluster.bench.serve.load_run import Limits, run_loads
from cluster.bench.serve.target import Answer, TargetFailure, TargetModel


class FakeTarget:
    """Answers each request with ``max_tokens`` tokens after ``delay_s``; every ``failing``-th one fails."""

    def __init__(self, delay_s=0.0, failing=0, stall_s=0.0):
        self.delay_s, self.failing, self.stall_s = delay_s, failing, stall_s
        self.prompts, self.under_way, self.most_under_way = [], 0, 0

    async def model(self):
        return TargetModel(name="fake", vocab_size=50)

    async def generate(self, prompt, *, max_tokens, priority, seed, deadline_s, on_tokens):
        self.prompts.append(prompt)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        if self.stall_s and len(self.prompts) == 1:
            time.sleep(self.stall_s)  # noqa: ASYNC251 - a client whose loop hangs is what is tested
        try:
            await asyncio.sleep(self.delay_s)
            if self.failing and len(self.prompts) % self.failing == 0:
                raise TargetFailure("BUSY", retry_after_s=2.5)
            on_tokens(1)
            on_tokens(max_tokens - 1)
            return Answer(num_new_tokens=max_tokens, cached_tokens=3, num_moves=1)
        finally:
            self.under_way -= 1

    async def close(self):
        pass


def load(arrivals):
    return DrawnLoad(arrivals=arrivals, prompt=Lengths(low=5, high=5), new=Lengths(low=4, high=4))


async def run(target, arrivals, **limits):
    return await run_loads(target, [load(arrivals)], Limits(**limits), seed=1)


async def test_an_open_loop_sends_whatever_the_answers_do():
    target = FakeTarget(delay_s=0.5)
    recording = await run(target, Rate(per_s=200.0, variation=0.0), num_requests=40)
    assert target.most_under_way == 40
    assert [record.due_s for record in recording.records] == pytest.approx([i / 200 for i in range(1, 41)])
    assert all(record.ttft_s >= 0.5 for record in recording.records)


async def test_a_closed_loop_keeps_its_concurrency():
    target = FakeTarget(delay_s=0.01)
    recording = await run(target, Closed(concurrency=3), num_requests=20)
    assert (len(recording.records), target.most_under_way) == (20, 3)


async def test_a_closed_loop_ends_when_its_time_is_up():
    recording = await run(FakeTarget(delay_s=0.01), Closed(concurrency=2), duration_s=0.2)
    assert recording.records
    assert all(record.due_s < 0.2 for record in recording.records)


async def test_what_still_runs_after_the_grace_is_cut_off_and_says_so():
    target = FakeTarget(delay_s=30.0)
    recording = await run(target, Rate(per_s=50.0, variation=0.0), duration_s=0.2, grace_s=0.1)
    assert {record.status for record in recording.records} == {"CUT OFF (the run was over)"}
    assert (len(recording.records), target.under_way) == (9, 0)


async def test_what_came_is_written_down():
    target = FakeTarget(failing=2)
    recording = await run(target, Closed(concurrency=1), num_requests=4)
    good, bad = recording.records[0], recording.records[1]
    assert (good.status, good.num_new_tokens, good.cached_tokens, good.num_moves) == ("OK", 4, 3, 1)
    assert (list(good.counts), len(good.times_s), good.num_prompt_tokens) == ([1, 3], 2, 5)
    assert (bad.status, bad.retry_after_s, bad.num_new_tokens) == ("BUSY", 2.5, 0)
    assert bad.ended_s is not None and bad.ttft_s is None
    assert all(len(prompt) == 5 and max(prompt) < 50 for prompt in target.prompts)
    assert recording.num_running == 0


async def test_latencies_count_from_when_a_request_was_due():
    """A client that hangs sends late. Were its requests timed from then on, nobody would see that they waited."""
    recording = await run(FakeTarget(stall_s=0.3), Rate(per_s=100.0, variation=0.0), num_requests=20)
    late = recording.records[1]
    assert late.sent_s - late.due_s > 0.2
    assert late.ttft_s > 0.2


async def test_loads_run_together():
    loads = [load(Closed(concurrency=1)), load(Rate(per_s=100.0))]
    recording = await run_loads(FakeTarget(delay_s=0.01), loads, Limits(num_requests=5), seed=1)
    assert sorted(record.load for record in recording.records) == [0] * 5 + [1] * 5


async def test_a_fault_of_the_benchmark_itself_is_no_status():
    class Broken(FakeTarget):
        async def generate(self, prompt, **_):
            raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        await run(Broken(), Closed(concurrency=1), num_requests=1)
    assert caught.group_contains(ZeroDivisionError)
