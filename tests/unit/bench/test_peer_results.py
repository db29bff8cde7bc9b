"""How the engines' rounds become figures, and figures become ratios."""

import pytest
from bench.peer_results import Bar, bars_of, figures_of, table_of


def create_round(*, start_s=1.0, step_s=0.5, num_requests=2, prefill_s=2.0):
    """Two tokens of each request, and everything else that a runner reports."""
    events = [[at, request, 1] for at in (start_s, start_s + step_s) for request in range(num_requests)]
    return [
        {"kind": "first token", "at_s": start_s},
        {"kind": "prefill", "num_requests": 1, "events": [[prefill_s, 0, 1]]},
        {"kind": "batch", "num_requests": num_requests, "events": events},
        {"kind": "memory", "peak_bytes": 3 * 2**20},
    ]


def test_figures_of_one_round():
    assert figures_of([create_round()], 512) == {
        "first token": 1.0,
        "prefill": 256.0,
        "decode 2": 2 / 0.5,
        "whole run 2": 4 / 1.5,
        "peak memory": 3.0,
    }


def test_figures_are_medians_over_the_rounds():
    rounds = [create_round(step_s=step_s, prefill_s=step_s) for step_s in (0.25, 4.0, 0.5)]
    figures = figures_of(rounds, 512)
    assert (figures["decode 2"], figures["prefill"]) == (4.0, 1024.0)


def test_a_bar_takes_the_best_of_both_sides():
    figures = {
        "cluster int8": {"decode 8": 90.0},
        "cluster int4": {"decode 8": 100.0},
        "openvino int8": {"decode 8": 50.0},
        "vllm float32": {"decode 8": 20.0},
        "transformers float32": {"decode 1": 500.0},
    }
    bar = Bar(figure="decode 8", must=1.25, reach=1.8)
    assert bar.compare(figures) == ("cluster int4", "openvino int8", 2.0)
    named = Bar(figure="decode 8", ours="cluster int8", peers=("vllm",), must=1.0, reach=1.0)
    assert named.compare(figures) == ("cluster int8", "vllm float32", 4.5)
    assert Bar(figure="decode 1", must=1.0, reach=1.0).compare(figures) is None  # ours has no such figure


@pytest.mark.parametrize(("ours", "verdict"), [(124.0, "MISSED"), (125.0, "met"), (179.0, "met"), (181.0, "reached")])
def test_a_ratio_is_judged_by_its_bar(ours, verdict):
    rows = bars_of("qwen2.5-0.5b", {"cluster int8": {"decode 8": ours}, "openvino int4": {"decode 8": 100.0}})
    assert [(row[0], row[-1]) for row in rows] == [("decode 8", verdict)]


def test_a_table_leaves_what_was_not_measured_empty():
    figures = {"cluster int8": {"decode 1": 41.26}, "openvino int8": {"decode 1": 1234.5, "prefill": 99.0}}
    assert table_of(figures, ["decode 1", "prefill"]) == [
        ["cluster int8", "41.3", ""],
        ["openvino int8", "1,234", "99.0"],
    ]
