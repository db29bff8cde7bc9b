"""``cluster serve`` as a person starts it, on a free port; it must be gone without a trace afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_START_TIMEOUT_S = 150
_STOP_TIMEOUT_S = 60


@dataclass
class Traces:
    """What a process and its children can leave on a machine.

    Attributes:
        mark: they all carry it in their environment.
        temp_dir: their own directory for temporary files.
        shared_memory: what was there before.
    """

    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    # Short, because Unix sockets lie deep below it.
    temp_dir: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="ct", dir="/tmp"))
    shared_memory: set[str] = field(default_factory=lambda: set(os.listdir("/dev/shm")))

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("CLUSTER_TEST_MARK") == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def left(self, ports: list[int]) -> dict[str, Any]:
        """What is there now and was not before; empty values where nothing is."""
        return {
            "processes": [process.cmdline() for process in self.processes() if process.is_running()],
            "shared memory": set(os.listdir("/dev/shm")) - self.shared_memory,
            "temporary files": os.listdir(self.temp_dir) if os.path.exists(self.temp_dir) else [],
            "ports": [port for port in ports if not is_free(port)],
        }


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServeProcess:
    """``cluster serve`` in a process group of its own, as a shell runs it."""

    def __init__(self, *arguments: str | Path, port: int | None = None, json: bool = True) -> None:
        port = free_port() if port is None else port
        self.traces = Traces()
        self.ready: dict[str, Any] = {}
        self.self_test: dict[str, Any] = {}
        self._stderr: list[str] = []
        self._leftovers: dict[str, Any] = {}
        self._process = subprocess.Popen(
            [Path(sys.executable).with_name("cluster"), "serve", *arguments, "--port", str(port), *["--json"][:json]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"CLUSTER_TEST_MARK": self.traces.mark, "TMPDIR": self.traces.temp_dir},
        )
        self._ports = [port] if port else []
        self._drainer = threading.Thread(target=self._collect_stderr)
        self._drainer.start()
        self._killer = threading.Timer(_START_TIMEOUT_S, self.kill)
        self._killer.start()

    @property
    def address(self) -> str:
        return self.ready["address"]

    @property
    def stderr(self) -> str:
        return "".join(self._stderr)

    def _collect_stderr(self) -> None:
        for line in self._process.stderr:
            self._stderr.append(line)

    def wait_stderr(self, text: str) -> None:
        """Returns when ``text`` has been written there."""
        while text not in self.stderr:
            assert self._process.poll() is None, self.stderr
            time.sleep(0.02)

    def wait_stdout(self, text: str) -> str:
        """What has been written there up to the end of the line that contains ``text``."""
        written = ""
        while text not in written:
            line = self._process.stdout.readline()
            assert line, f"the server ended instead of serving: {self.stderr}"
            written += line
        self._killer.cancel()
        return written

    def read_rest(self) -> str:
        """What it has written to standard output since; once it has ended."""
        return self._process.stdout.read()

    def wait_ready(self) -> ServeProcess:
        for name in ("ready", "self_test"):
            line = self._process.stdout.readline()
            assert line, f"the server ended instead of serving: {self.stderr}"
            setattr(self, name, json.loads(line))
        self._killer.cancel()
        return self

    def interrupt(self, number: signal.Signals) -> None:
        """To the whole group, as a terminal does with Ctrl-C."""
        os.killpg(self._process.pid, number)

    def wait(self) -> int:
        try:
            return self._process.wait(_STOP_TIMEOUT_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """Whatever happened before, nothing is left to disturb the next test."""
        self._killer.cancel()
        if self._process.poll() is not None and not self._leftovers:
            self._leftovers = self.traces.left(self._ports)
        for process in self.traces.processes():
            process.kill()
        self._process.wait()
        shutil.rmtree(self.traces.temp_dir, ignore_errors=True)
        if threading.current_thread() is not self._killer:
            self._drainer.join()

    def assert_no_trace(self) -> None:
        """What was there at the moment that the process had ended."""
        assert self._leftovers, "the process has not ended"
        assert not any(self._leftovers.values()), self._leftovers

    def actors(self, title: str) -> list[psutil.Process]:
        """Processes of Ray actors whose title contains ``title``."""
        found = []
        for process in self.traces.processes():
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found
