"""NCCL on one GPU, in a group of one.

Proves that cupy's calls, dtype codes and streams are right, that operations can be captured and replayed while the
watching thread looks on, and that deadlines, abort and close work on a real device. Proves nothing about several ranks.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parity.nccl_rank import check_capture, check_operations, check_order

from cluster.distributed.communicator import PeerLost
from cluster.distributed.nccl import NcclCommunicator, new_unique_id

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not NcclCommunicator.available(), reason="needs a CUDA device, cupy and NCCL"),
]
REPO = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda", 0)


def create_communicator(**options) -> NcclCommunicator:
    return NcclCommunicator(new_unique_id(), 0, 1, DEVICE, **{"timeout_s": 30.0, "build_timeout_s": 120.0} | options)


@pytest.fixture
def communicator() -> Iterator[NcclCommunicator]:
    made = create_communicator()
    yield made
    made.close()


def test_every_operation(communicator):
    check_operations(communicator, DEVICE)


def test_operations_wait_for_their_own_stream(communicator):
    stream = torch.cuda.Stream(DEVICE)
    x = torch.zeros(1 << 20, device=DEVICE)
    out = torch.zeros(1, 1 << 20, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.fill_(3)
        communicator.all_gather(x, out)  # on another stream it would overtake the fill
    stream.synchronize()
    assert out.eq(3).all()


def test_sums_in_order():
    communicator = create_communicator(batch_invariant=True)
    check_order(communicator, DEVICE)
    check_capture(communicator, DEVICE)
    communicator.close()


def test_capture_and_replay(communicator):
    check_capture(communicator, DEVICE)


def test_abort(communicator):
    communicator.all_reduce_(torch.ones(4, device=DEVICE))
    communicator.abort()
    for call in (
        communicator.check,
        communicator.barrier,
        lambda: communicator.all_reduce_(torch.ones(4, device=DEVICE)),
    ):
        with pytest.raises(PeerLost, match="aborted"):
            call()


def test_work_that_takes_too_long_is_noticed_on_the_device():
    communicator = create_communicator(timeout_s=0.3)
    torch.cuda._sleep(8_000_000_000)  # seconds; what is queued behind it does not finish in time
    communicator.all_reduce_(torch.ones(4, device=DEVICE))
    deadline = time.monotonic() + 60
    with pytest.raises(PeerLost, match="any operation to finish"):
        while time.monotonic() < deadline:
            communicator.check()
            time.sleep(0.01)
    communicator.close()
    torch.cuda.synchronize()


@pytest.mark.parametrize("end", ["communicator.close()", "pass"])
def test_an_interpreter_with_live_graphs_ends(end):
    """NCCL frees a communicator only when the graphs that recorded it are gone."""
    program = f"""
import torch
from cluster.distributed.nccl import NcclCommunicator, new_unique_id
device = torch.device("cuda", 0)
communicator = NcclCommunicator(new_unique_id(), 0, 1, device, timeout_s=30, build_timeout_s=120)
x, graph = torch.ones(4, device=device), torch.cuda.CUDAGraph()
communicator.all_reduce_(x)
with torch.cuda.graph(graph):
    communicator.all_reduce_(x)
graph.replay()
torch.cuda.synchronize()
{end}
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=REPO, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["done"]), done.stderr
