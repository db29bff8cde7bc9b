"""``cluster bench`` as a person runs it, on a model of a few milliseconds."""

import json

import pytest
from typer.testing import CliRunner

from cluster.bench.session import EngineSettings, Session
from cluster.checkpoint import resolve_checkpoint
from cluster.cli.main import app

SMALL = ["--threads", "1", "--batch", "1,2", "--prompt", "24", "--new", "5", "--prefill", "40"]


def test_engine_measures_a_shape():
    result = CliRunner().invoke(app, ["bench", "engine", "--shape", "demo", *SMALL, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {"processor", "cores", "commit"} <= set(report)
    figures = report["figures"]
    assert figures["settings"]["num_threads"] == figures["machine"]["num_threads"] == 1
    assert [batch["num_requests"] for batch in figures["batches"]] == [1, 2]
    for batch in figures["batches"]:
        assert batch["decode_tokens_per_s"] > 0 and batch["decode_share"] > 0
        assert batch["overhead_ms"] == pytest.approx(sum(batch["parts_ms"].values()) - batch["parts_ms"]["forward"])
    assert figures["weight_bytes"] == 5_770_496 * 4
    assert 0 < figures["overhead_bytes"] < figures["peak_bytes"]
    assert figures["prefill_tokens_per_s"] > 0 and figures["prefill_share"] > 0
    assert figures["first_token_s"] > 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "one of --model and --shape"),
        (["--model", "demo", "--shape", "demo"], "one of --model and --shape"),
        (["--shape", "demo", "--batch", "1,x"], "--batch"),
        (["--shape", "demo", "--batch", "0"], "--batch"),
    ],
)
def test_wrong_usage_is_named(args, said):
    result = CliRunner().invoke(app, ["bench", "engine", *args])
    assert result.exit_code == 2
    assert said in result.output


def test_an_unknown_shape_is_one_line():
    result = CliRunner().invoke(app, ["bench", "engine", "--shape", "gpt-5"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: there is no shape 'gpt-5'")


def test_a_session_times_every_decode_step_and_hands_tokens_out_as_they_come():
    settings = EngineSettings(
        checkpoint=str(resolve_checkpoint("demo")), weights="float32", num_threads=1, max_num_seqs=2
    )
    seen = []
    with Session(settings) as session:
        run = session.run([[5, 6, 7], [8, 9]], 4, on_tokens=lambda request, count: seen.append((request, count)))
    assert len(run.decode_steps) == 3
    assert sorted(seen) == [(0, 1)] * 4 + [(1, 1)] * 4
    assert seen == [(request, count) for _, request, count in run.timeline.events]
    for step in run.decode_steps:
        parts = (step.schedule, step.inputs, step.forward, step.sampling, step.output)
        assert min(parts) >= 0 and step.forward > 0
    total_s = sum(sum((s.schedule, s.inputs, s.forward, s.sampling, s.output)) for s in run.decode_steps)
    assert total_s <= run.timeline.end_s - run.timeline.all_started_s
