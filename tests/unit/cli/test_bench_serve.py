"""``cluster bench serve`` and ``cluster bench compare`` as a person runs them."""

import json
import subprocess
import sys

import pytest
from scripted_server import DEMO, chunks_of
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.errors import Overloaded
from cluster.v1 import inference_pb2 as pb


@pytest.fixture
def bench(server):
    server.script("ListModels", pb.ListModelsResponse(models=[DEMO]))
    server.script("GenerateStream", Overloaded("busy", retry_after_s=1.0), chunks_of("a", "b", "c"))

    def run(*args):
        return CliRunner().invoke(app, ["bench", "serve", "--address", server.address, *args])

    return run


def test_a_run_saved_drawn_and_compared(bench, tmp_path):
    saved, page = tmp_path / "first.json", tmp_path / "second.html"
    load = ["--requests", "20", "--prompt", "4-8", "--new", "3", "--classes", "P0:1,P2:1", "--goodput", "ttft:60000"]
    first = bench("--rate", "200", *load, "--save", str(saved), "--json")
    assert first.exit_code == 0, first.output
    report = json.loads(first.stdout)
    assert report == json.loads(saved.read_text())
    assert report["total"]["statuses"] == {"OK": 19, "RESOURCE_EXHAUSTED (OVERLOADED)": 1}
    assert report["total"]["good_share"] == 0.95
    assert set(report["classes"]) == {"P0", "P2"}
    assert report["settings"]["load"]["arrivals"] == {"kind": "Rate", "per_s": 200.0, "variation": 1.0}

    second = bench("--concurrency", "2", *load, "--html", str(page), "--against", str(saved))
    assert second.exit_code == 0, second.output
    assert "P0 first token" in second.stdout and "differs: load" in second.stdout
    assert "<svg" in page.read_text()

    compared = CliRunner().invoke(app, ["bench", "compare", str(saved), str(saved), "--json"])
    assert {change["ratio"] for change in json.loads(compared.stdout)["changes"]} <= {1.0, None}


def test_a_machine_that_only_makes_load_needs_no_torch():
    check = "import cluster.cli.bench, cluster.cli.bench_serve, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", check], text=True) == "False\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "--rate, --concurrency"),
        (["--rate", "1", "--concurrency", "1"], "--rate, --concurrency"),
        (["--rate", "1", "--prompt", "x"], "--prompt"),
        (["--rate", "1", "--new", "9-3"], "--new"),
        (["--rate", "1", "--classes", "P9:1"], "--classes"),
        (["--rate", "1", "--goodput", "itl:3"], "--goodput"),
        (["--rate", "1", "--ramp-to", "4", "--requests", "3"], "--ramp-to"),
    ],
)
def test_wrong_usage_names_the_option(bench, args, said):
    result = bench(*args)
    assert result.exit_code == 2
    assert said in result.output
