"""Figures of a run, against sums by hand."""

from __future__ import annotations

import math

import pytest

from cluster.sim.recording import Ending, Recording
from cluster.sim.report import Percentiles, Report, goodput
from cluster.sim.workload import Arrival


def record(recording: Recording, times_s: list[float], ending: Ending = Ending.FINISHED) -> None:
    """A request that arrives a second before its first token, and ends with its last."""
    request_id = recording.arrive(
        Arrival(at_s=times_s[0] - 1, num_prompt_tokens=1, num_output_tokens=len(times_s)),
    )
    for time_s in times_s:
        recording.sample(time_s, [request_id])
    recording.end(times_s[-1], request_id, ending)


def test_percentiles_are_values_that_came():
    assert Percentiles.of([3.0, 1.0, 2.0, 10.0]) == Percentiles(p50=2.0, p90=10.0, p99=10.0, mean=4.0, max=10.0)
    assert Percentiles.of(float(n) for n in range(1, 201)).p99 == 198.0
    assert math.isnan(Percentiles.of([]).p99)


def test_latencies_and_rates_of_a_window():
    recording = Recording()
    recording_times = [[1.0, 1.5, 2.5], [11.0, 13.0]]
    for times_s in recording_times:
        record(recording, times_s)
    record(recording, [14.0], Ending.LOST)
    whole = Report.of(recording, 0.0, 20.0)
    assert whole.endings == {"finished": 2, "lost": 1}
    assert (whole.ttft_s.p50, whole.itl_s.max, whole.itl_s.p50, whole.e2e_s.max) == (1.0, 2.0, 1.0, 3.0)
    assert (whole.requests_per_s, whole.tokens_per_s) == (2 / 20, 6 / 20)
    late = Report.of(recording, 10.0, 20.0)
    assert (late.endings, late.itl_s.p50) == ({"finished": 1, "lost": 1}, 2.0)
    assert late.tokens_per_s == 3 / 10


def test_a_report_needs_time():
    with pytest.raises(ValueError, match="report from"):
        Report.of(Recording(), 1.0, 1.0)


def test_goodput_counts_those_that_were_fast_enough():
    recording = Recording()
    record(recording, [1.0, 1.5, 2.0])  # half a second for a token
    record(recording, [1.0, 3.0, 4.0])  # one and a half
    record(recording, [1.0, 1.1], Ending.CANCELLED)
    assert goodput(recording.records, ttft_s=1.0, tpot_s=0.5) == 1
    assert goodput(recording.records, ttft_s=1.0, tpot_s=1.5) == 2
    assert goodput(recording.records, ttft_s=0.9, tpot_s=1.5) == 0
