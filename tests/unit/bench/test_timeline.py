"""Rates from the times at which tokens came out."""

import pytest

from cluster.bench.timeline import Timeline


def test_decode_counts_what_came_after_the_last_request_began():
    # Request 0 has three tokens before request 1 has its first, at 2 s.
    events = [(0.5, 0, 1), (1.0, 0, 1), (2.0, 0, 1), (2.0, 1, 1), (2.5, 0, 1), (2.5, 1, 1), (4.0, 1, 2)]
    timeline = Timeline(2, events)
    assert timeline.all_started_s == 2.0
    assert timeline.decode_tokens_per_s == 4 / 2.0
    assert timeline.tokens_per_s == 8 / 4.0
    assert (timeline.num_tokens, timeline.end_s) == (8, 4.0)


def test_a_request_without_a_token_leaves_decode_unmeasured():
    timeline = Timeline(2, [(0.5, 0, 1), (1.0, 0, 1)])
    assert timeline.all_started_s is None
    assert timeline.decode_tokens_per_s is None


@pytest.mark.parametrize("num_requests", [1, 3])
def test_first_tokens_alone_are_no_decode(num_requests):
    timeline = Timeline(num_requests)
    for request in range(num_requests):
        timeline.record(1.5, request)
    assert timeline.all_started_s == 1.5
    assert timeline.decode_tokens_per_s is None
    assert timeline.tokens_per_s == num_requests / 1.5


def test_no_events_are_no_tokens():
    timeline = Timeline(1)
    assert (timeline.num_tokens, timeline.end_s, timeline.tokens_per_s) == (0, 0.0, 0.0)
