import subprocess
import sys

import pytest
from scripted_server import ScriptedServer

# A shell's background jobs, and what they start, ignore Ctrl-C. These must not, wherever the tests run.
HEED_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
# Opening the terminal makes it the one whose keys Ctrl-C and Ctrl-D reach this session.
TAKE_TERMINAL = "import os; os.isatty(0) and os.close(os.open(os.ttyname(0), os.O_RDWR))"
CLUSTER = [
    sys.executable,
    "-c",
    f"{HEED_CTRL_C}\n{TAKE_TERMINAL}\nfrom cluster.cli.main import main; main()",
]


@pytest.fixture
def server():
    server = ScriptedServer()
    yield server
    server.stop()


@pytest.fixture
def cli(server):
    """Runs ``cluster ARGS --address SERVER`` in a process of its own."""

    def run(*args, stdin="", address=server.address):
        command = [*CLUSTER, *args, "--address", address]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def spawn(server):
    """Starts ``cluster ARGS --address SERVER`` and returns the running process with its pipes."""
    started = []

    def start(*args, **options):
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        started.append(subprocess.Popen([*CLUSTER, *args, "--address", server.address], **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
