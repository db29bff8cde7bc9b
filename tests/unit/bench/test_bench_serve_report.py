"""From what was written down to figures, a page, and a comparison."""

import copy
import json
import re
from array import array

import pytest

from cluster.bench.serve.comparison import compare, differences
from cluster.bench.serve.figures import Targets, Window, figures_of
from cluster.bench.serve.load_run import Limits, Recording
from cluster.bench.serve.page import make_page
from cluster.bench.serve.record import Record
from cluster.bench.serve.report import make_report, read_report, write_report
from cluster.bench.serve.target import TargetModel
from cluster.core.request import Priority
from cluster.errors import ConfigError

WINDOW = Window(start_s=0.0, end_s=10.0)


def record(due_s=1.0, *, first_s=0.2, tokens=5, gap_s=0.1, priority=Priority.P1, **fields):
    """Answered with one token per message, the first after ``first_s``."""
    times = array("d", [due_s + first_s + index * gap_s for index in range(tokens)])
    given = {"load": 0, "priority": priority, "num_prompt_tokens": 100, "due_s": due_s, "sent_s": due_s, "status": "OK"}
    answer = {"times_s": times, "counts": array("L", [1] * tokens), "num_new_tokens": tokens, "ended_s": times[-1]}
    return Record(**(given | answer | fields))


def refused(due_s=1.0, **fields):
    return Record(
        load=0, priority=Priority.P3, num_prompt_tokens=7, due_s=due_s, sent_s=due_s, ended_s=due_s + 0.004,
        status="RESOURCE_EXHAUSTED (OVERLOADED)", **fields,
    )  # fmt: skip


def figures(*records, targets=None, window=WINDOW):
    return figures_of(records, window, targets or Targets(), all_tokens=10.0)


def test_latencies_of_one_request():
    found = figures(record())
    assert found.ttft_ms.p50 == pytest.approx(200)
    assert found.tpot_ms.p50 == pytest.approx(100)
    assert found.itl_ms.max == pytest.approx(100)
    assert found.e2e_ms.p99 == pytest.approx(600)
    assert (found.requests_per_s, found.tokens_per_s, found.token_share) == (0.1, 0.5, 0.5)
    assert found.good_per_s is None


def test_percentiles_are_values_that_were_seen():
    found = figures(*(record(first_s=index / 1000) for index in range(1, 101)))
    assert (found.ttft_ms.p50, found.ttft_ms.p90, found.ttft_ms.p99, found.ttft_ms.max) == (50, 90, 99, 100)


def test_failures_have_a_status_and_a_time_and_no_latency():
    found = figures(record(), refused(), refused(2.0))
    assert found.statuses == {"RESOURCE_EXHAUSTED (OVERLOADED)": 2, "OK": 1}
    assert found.failed_ms.p99 == pytest.approx(4)
    assert found.requests_per_s == 0.1
    assert found.e2e_ms.p50 == pytest.approx(600)


def test_goodput_is_of_those_that_finish_and_keep_every_target():
    records = [record(), record(first_s=0.4), record(gap_s=0.3), refused()]
    targets = Targets(common={"ttft": 300, "tpot": 200})
    assert figures(*records, targets=targets).good_share == 0.25
    assert figures(*records, targets=Targets(common={"ttft": 300})).good_share == 0.5
    assert figures(*records, targets=Targets(common={"e2e": 1e9})).good_share == 0.75


def test_a_class_may_have_targets_of_its_own():
    records = [record(first_s=0.4, priority=Priority.P0), record(first_s=0.4, priority=Priority.P3)]
    targets = Targets(common={"ttft": 500}, by_class={Priority.P0: {"ttft": 300}})
    assert [targets.kept(one) for one in records] == [False, True]


def test_a_completion_of_one_token_keeps_any_time_per_token():
    assert Targets(common={"tpot": 0.001}).kept(record(tokens=1))


def test_only_what_is_due_in_the_window_counts_and_only_tokens_that_come_in_it():
    window = Window(start_s=1.35, end_s=3.0)
    found = figures(record(1.0), record(2.0), record(2.85), window=window)
    assert found.num_requests == 2
    assert found.tokens_per_s == pytest.approx((3 + 5 + 0) / 1.65, abs=0.001)


def test_tokens_of_messages_that_do_not_tell_count_in_proportion():
    known_at_the_end = record(9.75, tokens=4, num_new_tokens=8)  # the first is at 9.95, the others too late
    assert figures(known_at_the_end).tokens_per_s == pytest.approx(8 / 4 / 10)


def test_an_unknown_target_is_refused():
    with pytest.raises(ConfigError, match="no target"):
        Targets(common={"itl": 3})


@pytest.fixture
def report():
    records = [record(0.5 * index, priority=Priority(index % 2)) for index in range(12)] + [refused(3.0)]
    recording = Recording(TargetModel(name="<demo>"), started_s=0.0, records=records)
    return make_report(recording, Limits(duration_s=6.0), Targets(common={"ttft": 300}), {"seed": 0, "load": "a"})


def test_a_report_is_plain_json_and_comes_back(report, tmp_path):
    file = tmp_path / "report.json"
    write_report(report, file)
    assert read_report(file) == json.loads(json.dumps(report)) == report
    assert set(report["classes"]) == {"P0", "P1", "P3"}
    assert {"processor", "cores", "commit"} <= set(report)
    assert sum(scope["token_share"] for scope in report["classes"].values()) == pytest.approx(1, abs=1e-3)
    tokens = sum(sum(series["tokens_per_s"]) for series in report["series"].values()) * 0.5
    assert tokens == pytest.approx(12 * 5)


def test_a_run_of_which_nothing_counts_is_an_error():
    recording = Recording(TargetModel(name="demo"), started_s=0.0)
    with pytest.raises(ConfigError, match="nothing was sent"):
        make_report(recording, Limits(num_requests=1, warm_up_s=3.0), Targets(), {})


def test_what_is_no_report_says_so(tmp_path):
    file = tmp_path / "other.json"
    for text in ("[]", "{}", "{"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(str(file))):
            read_report(file)


def test_a_page_needs_no_other_file_and_obeys_no_markup(report):
    page = make_page(report)
    assert not re.search(r"<script|<link|<img|src=|url\(|https?:", page)
    assert "&lt;demo&gt;" in page and "<demo>" not in page
    assert page.count("<svg") == 10
    assert "RESOURCE_EXHAUSTED (OVERLOADED)" in page
    assert "Against" not in page


def test_a_page_of_a_run_without_answers(report):
    recording = Recording(TargetModel(name="demo"), started_s=0.0, records=[refused(), refused(2.0)])
    page = make_page(make_report(recording, Limits(duration_s=5.0), Targets(), {}), report)
    assert "nothing to show" not in page.split("Over time")[1]
    assert "nan" not in page.lower()


def test_two_reports_compare(report):
    later = copy.deepcopy(report)
    later["total"]["ttft_ms"]["p99"] *= 2
    later["settings"]["load"] = "b"
    later["classes"].pop("P3")
    changes = {(one.scope, one.figure): one for one in compare(report, later)}
    assert changes["all", "ttft_ms p99"].ratio == pytest.approx(2)
    assert changes["all", "ttft_ms p50"].ratio == pytest.approx(1)
    assert changes["P3", "requests not OK"].before == 1 and changes["P3", "requests not OK"].after is None
    assert differences(report, later) == ["load: a and b"]
    page = make_page(later, report)
    assert '<span class="worse">2.000</span>' in page and "P0 earlier" in page and "stroke-dasharray" in page
