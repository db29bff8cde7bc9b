"""A Ray of our own on this machine: started for one cluster, and gone without a trace when it stops."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ConfigError, EngineFault
from cluster.serve.config import RayConfig

LOCAL_ADDRESS = "127.0.0.1"
_MARK = "CLUSTER_SESSION"
_PREFIX = "llm-cluster-"
_MAX_TEMP_LENGTH = 40  # Ray puts sockets about 60 characters deep; Unix allows 107
_EXIT_TIMEOUT_S = 3.0
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
}


class LocalRay:
    """Owns the processes, the temporary directory and the environment of one local Ray.

    Must be started on the main thread: Ray's processes die with the thread that started them, kill -9 included.
    """

    def __init__(self, config: RayConfig) -> None:
        self._config = config
        self._directory: Path | None = None
        self._lock: int | None = None
        self.dashboard_url: str | None = None
        self.notes: list[str] = []

    def start(self) -> None:
        """Starts Ray's processes and connects this one to them.

        Raises:
            ConfigError: the dashboard's address is not this machine's.
            EngineFault: Ray did not start; the message says why.
        """
        sweep_dead_sessions()
        os.environ.update(_ENVIRONMENT)
        while self._lock is None:  # a sweep may have come between the two lines
            self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_parent_directory()))
            self._lock = _lock(self._directory)
        os.environ[_MARK] = self._directory.name
        _ensure_token()
        import ray

        quieten()
        port = self._dashboard_port() if self._config.dashboard else None
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            # What Ray's processes leave in the directory for temporary files goes with the session.
            with _environment(TMPDIR=str(self._directory)), _interrupt_deferred():
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
                    _temp_dir=str(self._directory),
                )
        except Exception as error:  # Ray has no common class for these
            raise EngineFault(f"Ray could not start: {' '.join(str(error).split())}") from error
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init takes it
        stop_error_printer()
        if self._config.dashboard:
            self.dashboard_url = f"http://{context.dashboard_url}"

    @property
    def alive(self) -> bool:
        """Whether there is still a Ray to talk to."""
        import ray

        node = ray._private.worker._global_node
        return node is not None and not {"raylet", "gcs_server"} & {name for name, _ in node.dead_processes()}

    def stop(self) -> None:
        """Ends every process, waits until all are gone, and removes the temporary directory. Idempotent."""
        import ray

        ray.shutdown()
        os.environ.pop(_MARK, None)
        if self._directory is not None:
            _remove_session(self._directory)
            self._directory = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets environment variables for what is started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end."""
    numbers = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@contextlib.contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Ctrl-C takes effect at the end, here alone: an exception in the middle of Ray's connecting crashes the process
    later, and what is started inside ignores the Ctrl-C that a terminal sends to all, so that it can be drained.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # one that comes waits, ignored or not
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def stop_error_printer() -> None:
    """Ray prints the death of every worker on standard output. That is ours, and others read it; where nobody does, a
    full pipe would keep Ray from shutting down. What there is to tell, our own messages tell.
    """
    import ray

    worker = ray._private.worker.global_worker
    worker.threads_stopped.set()
    worker.gcs_error_subscriber.close()


def quieten() -> None:
    """Ray's own messages stay in its log files; its failures are told by ours. Serve resets this on import."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def sweep_dead_sessions() -> None:
    """Ends what is left of clusters whose process was killed before it could: Ray's agents outlive it by a minute."""
    for directory in _parent_directory().glob(f"{_PREFIX}*"):
        lock = _lock(directory)
        if lock is not None:
            _remove_session(directory)
            os.close(lock)


def _remove_session(directory: Path) -> None:
    _end_processes(directory.name)
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


def _parent_directory() -> Path:
    parent = tempfile.gettempdir()
    return Path(parent if len(parent) <= _MAX_TEMP_LENGTH else "/tmp")


def _lock(directory: Path) -> int | None:
    """Takes the directory for this process; None where a living one has it. The kernel lets go when a process dies."""
    try:
        file = os.open(directory, os.O_RDONLY)
    except OSError:  # gone meanwhile, or another user's
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


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
    """Asks, waits, and kills what is still there."""
    deadline = time.monotonic() + _EXIT_TIMEOUT_S
    for pid in _processes(mark):
        _signal(pid, signal.SIGTERM)
    while processes := _processes(mark):
        if time.monotonic() > deadline:
            for pid in processes:
                _signal(pid, signal.SIGKILL)
        time.sleep(0.05)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
