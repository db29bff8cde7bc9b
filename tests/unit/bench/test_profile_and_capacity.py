"""``cluster bench profile`` on a model of a few milliseconds, and ``cluster bench capacity`` on what it wrote."""

import json

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.sim.latency import StepLoad, StepTimes, read_profile

GRID = ["--decodes", "1,3", "--contexts", "20,50", "--prefill", "16,48", "--starts", "33"]
PROFILE = ["bench", "profile", "--shape", "demo", "--threads", "1", "--rounds", "2", "--held-out", "3", *GRID]
ROW = "2023-11-16 18:{minute:02}:00,{prompt},{output}\n"


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    result = CliRunner().invoke(app, [*PROFILE, "--out", str(path)])
    assert result.exit_code == 0, result.output
    return path


def test_a_profile_says_where_it_was_taken_and_holds_the_whole_grid(profile):
    written = read_profile(profile)
    assert {"processor", "cores", "commit"} <= set(written)
    assert written["settings"]["num_threads"] == 1
    assert written["grid"] == {
        "num_samples": [0, 1, 3],
        "sample_contexts": [20, 50],
        "num_prefill_tokens": [0, 16, 48],
        "prefill_starts": [0, 33],
    }
    times = StepTimes.from_profile(written)
    load = StepLoad(num_samples=3, sample_context=50, num_prefill_tokens=48, prefill_attended=33 + 49 / 2)
    assert times.step_s(load) == pytest.approx(written["step_ms"][2][1][2][1] / 1e3)
    # Where nothing samples contexts do not matter, nor starts where nothing is prefilled.
    assert written["step_ms"][0][0] == written["step_ms"][0][1]
    assert len(set(written["step_ms"][1][0][0])) == 1


def test_what_was_held_out_lies_within_the_grid_and_is_compared(profile):
    written = read_profile(profile)
    times = StepTimes.from_profile(written)
    assert len(written["held_out"]) == 3
    for point in written["held_out"]:
        load = StepLoad(**point["load"])
        assert 1 <= load.num_samples <= 3 and 20 <= load.sample_context <= 60 and load.num_prefill_tokens <= 48
        assert point["predicted_ms"] == pytest.approx(1e3 * times.step_s(load))
        assert point["measured_ms"] > 0
    errors = [point["predicted_ms"] / point["measured_ms"] - 1 for point in written["held_out"]]
    assert written["held_out_bias"] == pytest.approx(sum(errors) / 3)


def steady_profile():
    """A profile as one would be written by a machine that takes 10 ms and one more for every token."""
    tokens = {"num_samples": [0, 1, 4], "num_prefill_tokens": [0, 16, 64]}
    return {
        "grid": tokens | {"sample_contexts": [1, 9], "prefill_starts": [0, 9]},
        "step_ms": [
            [[[10.0 + samples + prefill] * 2 for prefill in tokens["num_prefill_tokens"]]] * 2
            for samples in tokens["num_samples"]
        ],
    }


def test_capacity_of_a_profile_and_a_trace(tmp_path):
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(steady_profile()))
    trace = tmp_path / "trace.csv"
    rows = [ROW.format(minute=index, prompt=40 + index, output=5 + index % 7) for index in range(20)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))
    command = ["bench", "capacity", "--profile", str(profile), "--trace", str(trace), "--batch", "4"]
    result = CliRunner().invoke(app, [*command, "--requests", "100", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    comparison = report["comparison"]
    assert report["ratio"] == comparison["chunked"]["rate"] / comparison["prefill_first"]["rate"]
    terms = comparison["terms"]
    assert terms["itl_p99_s"] == pytest.approx(2 * 0.012)
    for policy in ("chunked", "prefill_first"):
        assert comparison[policy]["report"]["itl_s"]["p99"] <= terms["itl_p99_s"]
        assert comparison[policy]["report"]["endings"].keys() == {"finished"}


def test_a_grid_beyond_the_models_context_is_one_line(tmp_path):
    result = CliRunner().invoke(app, [*PROFILE, "--contexts", "20,5000", "--out", str(tmp_path / "profile.json")])
    assert result.exit_code == 1
    assert "max_model_len" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("profile", "rows", "said"),
    [
        ("", ROW, "not JSON"),
        ("[]", ROW, "no profile"),
        ("{}", ROW, "no profile"),
        (json.dumps(steady_profile()), "", "no requests"),
    ],
)
def test_files_of_another_kind_are_one_line(tmp_path, profile, rows, said):
    path, trace = tmp_path / "profile.json", tmp_path / "trace.csv"
    path.write_text(profile)
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows.format(minute=0, prompt=5, output=5))
    result = CliRunner().invoke(app, ["bench", "capacity", "--profile", str(path), "--trace", str(trace)])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and said in line
