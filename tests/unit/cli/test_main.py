"""The command as a whole: its help, its exit codes, and what it does not import."""

import json
import signal
import socket
import subprocess
import sys
import threading

import pytest
from scripted_server import DEMO, chunks_of, hanging, response_of
from typer.testing import CliRunner

from cluster import errors
from cluster.cli.main import app
from cluster.v1 import inference_pb2 as pb


def test_help_has_a_line_per_command_examples_and_exit_codes():
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0
    lines = [line.strip("│ ") for line in result.output.splitlines()]
    for name in ("serve", "generate", "chat", "models", "status", "bench"):
        [line] = [line for line in lines if line.startswith(f"{name} ")]
        assert line.endswith(".")
    assert "cluster serve ~/models/Qwen3-0.6B         a Hugging Face directory" in lines
    assert [line.split()[0] for line in lines[lines.index("Exit codes") + 1 :] if line] == ["0", "1", "2", "3", "130"]


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output.startswith("cluster 0.")


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["generate"],
        ["generate", "x", "--top-p", "0"],
        ["generate", "x", "--logprobs", "2"],
        ["models", "x"],
        ["serve", "demo", "--tp", "two"],
    ],
)
def test_wrong_usage_is_2(args):
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_an_option_out_of_range_is_named():
    result = CliRunner().invoke(app, ["generate", "x", "--max-tokens", "0"])
    assert result.exit_code == 2
    assert "--max-tokens" in result.output and "it must be in" in result.output


@pytest.mark.parametrize("args", [["models"], ["status"], ["generate", "x"], ["chat"]])
def test_no_server_is_3(cli, args):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        done = cli(*args, address=address)
    assert done.returncode == 3
    [line] = done.stderr.splitlines()
    assert address in line and "cluster serve" in line
    assert done.stdout == ""


def test_an_error_of_the_server_is_1_and_one_line(cli, server):
    server.script("GenerateStream", errors.ModelNotFound("no model 'x' here; there is 'demo'"))
    done = cli("generate", "hi", "--model", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no model 'x' here; there is 'demo'\n"


def test_ctrl_c_is_130_and_cancels(spawn, server):
    server.script("GenerateStream", hanging(*chunks_of("first", " second")[:1]))
    process = spawn("generate", "x")
    assert process.stdout.read(5) == b"first"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, b"")
    assert server.ended.get(timeout=30) == "GenerateStream"


def test_ctrl_c_is_130_and_cancels_where_the_answer_comes_at_once(spawn, server):
    started, gone = threading.Event(), threading.Event()

    def wait(request, context):
        context.add_callback(gone.set)
        started.set()
        gone.wait(60)
        return response_of("late")

    server.script("Generate", wait)
    process = spawn("generate", "x", "--no-stream")
    assert started.wait(timeout=60)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 130
    assert gone.wait(timeout=30)


def test_a_reader_that_leaves_is_no_error(spawn, server):
    server.script("GenerateStream", lambda request, context: iter(chunks_of(*["text\n"] * 50_000)))
    process = spawn("generate", "x")
    assert process.stdout.readline() == b"text\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0
    assert server.ended.get(timeout=30) == "GenerateStream"


def test_neither_help_nor_a_client_command_imports_torch_or_ray(server):
    server.script("GenerateStream", chunks_of("a"))
    server.script("ListModels", pb.ListModelsResponse(models=[DEMO]))
    program = """
import json, sys
from cluster.cli.main import app
try:
    app(json.loads(sys.argv[1]))
except SystemExit as end:
    assert end.code == 0, end.code
heavy = sys.modules.keys() & {"torch", "ray", "transformers", "numpy", "tokenizers"}
sys.exit(f"imported {heavy}" if heavy else "grpc" in sys.modules and 40)
"""
    for args, code in (
        (["--help"], 0),  # not even grpc
        (["generate", "x", "--address", server.address], 40),
        (["status", "--address", server.address], 40),
    ):
        command = [sys.executable, "-c", program, json.dumps(args)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (code, "")
