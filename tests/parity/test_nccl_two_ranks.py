"""NCCL with two ranks, on two GPUs or, where NCCL allows it, on one.

Proves that sums and messages between processes are right, eagerly and in replayed graphs, and that a rank whose peer is
killed or stopped gets an error instead of hanging. On one device it says nothing about speed, NVLink or InfiniBand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from parity.nccl_meeting import alone_on_its_host

from cluster.distributed.nccl import NcclCommunicator, load_nccl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not NcclCommunicator.available(), reason="needs a CUDA device, cupy and NCCL"),
]
RANK = Path(__file__).with_name("nccl_rank.py")
TESTS = RANK.parents[1]


def two_gpus(rank: int) -> dict[str, str]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return {}


def ranks_share_a_gpu(rank: int) -> dict[str, str]:
    if load_nccl().get_version() < 23000:
        pytest.skip("needs NCCL 2.30")
    return {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "CUDA_VISIBLE_DEVICES": "0"}


def hosts_by_name(rank: int) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": "0"} | alone_on_its_host(rank)


Spawn = Callable[..., tuple[subprocess.Popen[str], subprocess.Popen[str]]]


@pytest.fixture(params=[two_gpus, ranks_share_a_gpu, hosts_by_name])
def spawn(request) -> Iterator[Spawn]:
    """Starts both ranks with a scenario and a deadline."""
    processes: list[subprocess.Popen[str]] = []

    def start(scenario: str, timeout_s: float) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
        for rank in range(2):
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(RANK), str(rank), str(timeout_s), scenario],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"} | request.param(rank),
                )
            )
        tell(processes[1], processes[0].stdout.readline())
        return processes[0], processes[1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], line: str) -> None:
    process.stdin.write(line.strip() + "\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    """The next line. Skips the test where NCCL refuses two ranks on one device."""
    line = process.stdout.readline().strip()
    if "NCCL_ERROR_INVALID_USAGE" in line:
        pytest.skip(f"NCCL refuses this: {line}")
    return line


def finish(ranks: tuple[subprocess.Popen[str], ...]) -> None:
    assert [answer(rank) for rank in ranks] == ["done", "done"]
    for rank in ranks:
        tell(rank, "leave")
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]


@pytest.mark.parametrize("scenario", ["operations", "capture", "order"])
def test_two_ranks_agree(spawn, scenario):
    finish(spawn(scenario, timeout_s=60))


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_peer_is_an_error_and_no_hang(spawn, fate):
    survivor, peer = spawn("loss", timeout_s=5)
    assert [answer(survivor), answer(peer)] == ["joined", "joined"]
    peer.send_signal(fate)
    tell(survivor, "go")
    assert answer(survivor).startswith("lost NCCL rank 0 of 2 on cuda:0")
    assert survivor.wait(timeout=60) == 0


def test_two_ranks_that_stay_lose_nothing(spawn):
    """What the two tests above would see if loss were reported whatever happens."""
    ranks = spawn("loss", timeout_s=60)
    assert [answer(rank) for rank in ranks] == ["joined", "joined"]
    for rank in ranks:
        tell(rank, "go")
    finish(ranks)
