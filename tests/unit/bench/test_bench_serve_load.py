"""What ``cluster bench serve`` sends, and when."""

import itertools
import json
import statistics

import pytest

from cluster.bench.serve.arrivals import Closed, Ramp, Rate
from cluster.bench.serve.load import Classes, DrawnLoad, Lengths, PromptMaker, TraceLoad
from cluster.core.request import Priority
from cluster.errors import ConfigError

RATE = Rate(per_s=50.0)


def drawn(**fields):
    given = {"arrivals": RATE, "prompt": Lengths(low=8, high=32), "new": Lengths(low=4, high=4)} | fields
    return DrawnLoad(**given)


def take(load, count, seed=1):
    return list(itertools.islice(load.requests(seed), count))


def gaps(requests):
    times = [0.0, *(request.at_s for request in requests)]
    return [after - before for before, after in itertools.pairwise(times)]


@pytest.mark.parametrize("variation", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_variation_asked_for(variation):
    found = gaps(take(drawn(arrivals=Rate(per_s=50.0, variation=variation)), 20_000))
    assert statistics.mean(found) == pytest.approx(1 / 50, rel=0.1)
    assert statistics.stdev(found) / statistics.mean(found) == pytest.approx(variation, rel=0.1, abs=0.01)


def test_a_ramp_goes_from_one_rate_to_the_other_and_stays_there():
    load = drawn(arrivals=Ramp(first_per_s=0.0, last_per_s=400.0, duration_s=10.0))
    times = [request.at_s for request in take(load, 6000)]
    counts = [sum(start <= at_s < start + 1 for at_s in times) for start in range(14)]
    for second in range(10):
        assert counts[second] == pytest.approx(400 * (second + 0.5) / 10, rel=0.3, abs=15)
    for second in range(10, 14):
        assert counts[second] == pytest.approx(400, rel=0.2)


def test_a_ramp_down_ends_at_its_rate():
    times = [r.at_s for r in take(drawn(arrivals=Ramp(first_per_s=400.0, last_per_s=100.0, duration_s=4.0)), 1400)]
    assert times == sorted(times)
    assert sum(at_s < 4 for at_s in times) == pytest.approx(1000, rel=0.1)
    assert sum(4 <= at_s < 6 for at_s in times) == pytest.approx(200, rel=0.25)


def test_the_same_seed_sends_the_same_and_another_does_not():
    load = drawn(classes=Classes(weights={Priority.P0: 1, Priority.P3: 3}))
    assert take(load, 50) == take(load, 50)
    assert take(load, 50, seed=1) != take(load, 50, seed=2)


def test_a_change_of_lengths_leaves_the_times():
    assert gaps(take(drawn(), 50)) == gaps(take(drawn(prompt=Lengths(low=1, high=900)), 50))


def test_classes_come_by_weight():
    requests = take(drawn(classes=Classes(weights={Priority.P0: 1, Priority.P3: 3, Priority.P1: 0})), 4000)
    assert {request.priority for request in requests} == {Priority.P0, Priority.P3}
    assert sum(request.priority == Priority.P0 for request in requests) == pytest.approx(1000, rel=0.15)


def test_prompts_share_their_prefixes_and_nothing_else():
    load, maker = drawn(num_prefixes=3, prefix_tokens=16, prompt=Lengths(low=8, high=8)), PromptMaker(500, salt=7)
    prompts = [maker.make(request.prompt) for request in take(load, 60)]
    assert {len(prompt) for prompt in prompts} == {24}
    assert all(0 <= token_id < 500 for prompt in prompts for token_id in prompt)
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 3
    assert len({tuple(prompt[16:]) for prompt in prompts}) == 60


def test_another_salt_makes_other_prompts():
    (request,) = take(drawn(), 1)
    assert PromptMaker(500, salt=1).make(request.prompt) != PromptMaker(500, salt=2).make(request.prompt)


def test_a_mooncake_trace_keeps_its_times_lengths_and_shared_blocks(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 50, "hash_ids": [1, 2, 3]},
        {"timestamp": 3000, "input_length": 1030, "output_length": 7, "hash_ids": [1, 2, 4]},
        {"timestamp": 4000, "input_length": 300, "output_length": 9, "hash_ids": [9]},
        {"timestamp": 5000, "input_length": 90_000, "output_length": 9, "hash_ids": [*range(20, 196)]},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    requests = list(TraceLoad(path=trace, speed=2.0, scale=0.25, max_tokens=1000).requests(0))
    assert [request.at_s for request in requests] == [0.0, 1.5, 2.0]
    assert [request.num_prompt_tokens for request in requests] == [275, 258, 75]
    assert [request.num_new_tokens for request in requests] == [12, 2, 2]
    first, second, third = (PromptMaker(1000, salt=0).make(request.prompt) for request in requests)
    assert first[:256] == second[:256] and first[256:] != second[256:]
    assert third[:75] != first[:75]


def test_an_azure_trace(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.1805900,396,109\n"
    )
    requests = list(TraceLoad(path=trace).requests(0))
    assert [request.at_s for request in requests] == pytest.approx([0.0, 1.5])
    assert [(request.num_prompt_tokens, request.num_new_tokens) for request in requests] == [(374, 44), (396, 109)]


def test_a_file_that_is_no_trace_says_so(tmp_path):
    other = tmp_path / "trace.txt"
    other.write_text("")
    with pytest.raises(ConfigError, match="no trace"):
        list(TraceLoad(path=other).requests(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rate(per_s=0.0),
        lambda: Rate(per_s=1.0, variation=-1.0),
        lambda: Ramp(first_per_s=1.0, last_per_s=0.0, duration_s=1.0),
        lambda: Closed(concurrency=0),
        lambda: Lengths(low=0, high=3),
        lambda: Lengths(low=4, high=3),
        lambda: Classes(weights={Priority.P0: 0.0}),
        lambda: drawn(num_prefixes=0),
    ],
)
def test_loads_that_cannot_be(make):
    with pytest.raises(ConfigError):
        make()
