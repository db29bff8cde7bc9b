"""A Ray of our own on this machine: started for one cluster, and gone without a trace when it stops."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

from cluster.errors import ConfigError
from cluster.serve.config import RayConfig

LOCAL_ADDRESS = "127.0.0.1"
_MARK = "CLUSTER_SESSION"
_PREFIX = "llm-cluster-"
_MAX_TEMP_LENGTH = 40  # Ray puts sockets about 60 characters deep; Unix allows 107
_EXIT_TIMEOUT_S = 10.0
# What actors need, on whatever Ray they run.
ACTOR_ENVIRONMENT = {
    # On a second event loop user code would pay a thread hop per call, and share gRPC's poller with the first.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
_ENVIRONMENT = ACTOR_ENVIRONMENT | {
    # Workers are niced by default; ours are the product, not a side job.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # One replica's logs go to Ray's session; our own structured ones are told apart there.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
}


class LocalRay:
    """Owns the processes, the temporary directory and the environment of one local Ray.

    Must be started on the main thread: Ray's processes die with the thread that started them, kill -9 included.
    """

    def __init__(self, config: RayConfig) -> None:
        self._config = config
        self._directory: Path | None = None
        self._mark = secrets.token_hex(8)
        self.dashboard_url: str | None = None
        self.notes: list[str] = []

    def start(self) -> None:
        """Starts Ray's processes and connects this one to them."""
        sweep_dead_sessions()
        os.environ.update(_ENVIRONMENT)
        os.environ[_MARK] = self._mark
        _ensure_token()
        import ray

        quieten()
        self._directory = _make_directory()
        port = self._dashboard_port() if self._config.dashboard else None
        on_sigterm = signal.getsignal(signal.SIGTERM)
        context = ray.init(
            address="local",
            num_cpus=self._config.num_cpus,
            num_gpus=self._config.num_gpus,
            object_store_memory=self._config.object_store_bytes,
            include_dashboard=self._config.dashboard,
            dashboard_host=self._config.dashboard_host,
            dashboard_port=port,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address=LOCAL_ADDRESS,
            _temp_dir=str(self._directory),
        )
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init takes it
        if self._config.dashboard:
            self.dashboard_url = f"http://{context.dashboard_url}"

    def stop(self) -> None:
        """Ends every process, waits until all are gone, and removes the temporary directory. Idempotent."""
        import ray

        ray.shutdown()
        _end_processes(self._mark)
        os.environ.pop(_MARK, None)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _dashboard_port(self) -> int:
        host, wanted = self._config.dashboard_host, self._config.dashboard_port
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, wanted))
                return int(probe.getsockname()[1])
            except OSError:
                pass
        with socket.socket() as probe:
            try:
                probe.bind((host, 0))
            except OSError as error:
                raise ConfigError(
                    f"the dashboard cannot bind {host}: {error.strerror}", field="ray.dashboard_host"
                ) from error
            port = int(probe.getsockname()[1])
        self.notes.append(f"port {wanted} is taken; the dashboard listens on {port}")
        return port


def quieten() -> None:
    """Of Ray's own messages only errors reach the terminal; its log files have all. Serve resets this on import."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def sweep_dead_sessions() -> None:
    """Removes the directories of clusters whose process was killed before it could."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = directory.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(directory, ignore_errors=True)


def token_path() -> Path | None:
    """The file that holds Ray's token; None where the environment holds it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _ensure_token() -> None:
    """Ray draws a token where there is none, but leaves its file readable to all; so it is written here."""
    path = token_path()
    if path is None or path.exists() or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another cluster may start at the same time
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(file, secrets.token_hex(32).encode())
        os.close(file)


def _make_directory() -> Path:
    parent = tempfile.gettempdir()
    if len(parent) > _MAX_TEMP_LENGTH:
        parent = "/tmp"
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))


def _processes(mark: str) -> list[int]:
    """Processes that inherited the mark, other than this one."""
    needle, found = f"{_MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def _end_processes(mark: str) -> None:
    deadline = time.monotonic() + _EXIT_TIMEOUT_S
    while processes := _processes(mark):
        if time.monotonic() > deadline:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + _EXIT_TIMEOUT_S
        time.sleep(0.05)
