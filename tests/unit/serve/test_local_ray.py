"""What a local Ray leaves and finds on the machine, without starting one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.serve import local_ray


@pytest.fixture
def temp_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="lr", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    shutil.rmtree(directory)


def test_a_sweep_ends_dead_sessions_and_spares_living_ones(temp_dir: Path):
    living, dead = temp_dir / "llm-cluster-living", temp_dir / "llm-cluster-dead"
    for directory in (living, dead):
        (directory / "session").mkdir(parents=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, os; f = os.open({str(living)!r}, os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_EX); "
            "print(flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    orphan = subprocess.Popen(["sleep", "100"], env={"CLUSTER_SESSION": dead.name, "PATH": "/usr/bin:/bin"})
    bystander = subprocess.Popen(["sleep", "100"], env={"CLUSTER_SESSION": living.name, "PATH": "/usr/bin:/bin"})
    try:
        holder.stdout.readline()
        collector = threading.Thread(target=orphan.wait)  # it is our child: somebody has to take its exit code
        collector.start()
        local_ray.sweep_dead_sessions()
        collector.join(10)
        assert orphan.poll() is not None and not dead.exists()
        assert bystander.poll() is None and living.exists()
    finally:
        holder.communicate(b"\n", timeout=10)
        for process in (orphan, bystander):
            process.kill()
            process.wait()
    local_ray.sweep_dead_sessions()
    assert not living.exists()


def test_a_new_token_is_readable_by_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "ray" / "auth_token"
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert local_ray.token_path() == path
    local_ray._ensure_token()
    token = path.read_text()
    assert len(token) == 64 and path.stat().st_mode & 0o777 == 0o600
    local_ray._ensure_token()
    assert path.read_text() == token


def test_a_token_from_the_environment_needs_no_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 64)
    assert local_ray.token_path() is None
