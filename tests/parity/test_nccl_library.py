"""NCCL's library without a GPU, where cupy and libnccl are installed.

Proves that both load as we load them, that unique ids are made and refused ids are, that the recording fake has cupy's
numbers and arguments, and that a failing NCCL ends in an error that says so. Proves nothing about collectives.
"""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
from parity.recording_nccl import FakeCuda, RecordingNccl, RecordingNcclCommunicator

from cluster.distributed.communicator import PeerLost
from cluster.distributed.nccl import UNIQUE_ID_BYTES, NcclCommunicator, load_nccl, new_unique_id
from cluster.distributed.nccl_cuda import CudaDevice
from cluster.errors import Unsupported

try:
    NCCL = load_nccl()
except Unsupported as error:
    pytest.skip(str(error), allow_module_level=True)

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_the_library_is_new_enough_to_be_aborted_from_another_thread():
    assert NCCL.get_version() >= 21903


def test_unique_ids_are_bytes_and_unique():
    ids = {new_unique_id() for _ in range(4)}
    assert len(ids) == 4
    assert {len(unique_id) for unique_id in ids} == {UNIQUE_ID_BYTES}
    assert all(type(unique_id) is bytes for unique_id in ids)


@pytest.mark.parametrize("name", [name for name in vars(RecordingNccl) if name.startswith("NCCL_")])
def test_the_fake_has_cupys_numbers(name):
    assert getattr(RecordingNccl, name) == getattr(NCCL, name)


@pytest.mark.parametrize(
    "name", ["allReduce", "allGather", "broadcast", "send", "recv", "check_async_error", "abort", "destroy"]
)
def test_the_fake_has_cupys_arguments(name):
    signature = getattr(NCCL.NcclCommunicator, name).__doc__.splitlines()[
        0
    ]  # "NcclCommunicator.send(self, intptr_t ..."
    arguments = signature.partition("(")[2].rpartition(")")[0].split(", ")
    fake = inspect.signature(getattr(RecordingNcclCommunicator, name))
    assert [argument.split()[-1] for argument in arguments] == list(fake.parameters)


def test_a_status_that_cupy_does_not_know_is_a_key_error():
    """What the communicator takes for "in progress" and other late additions."""
    with pytest.raises(KeyError) as in_progress:
        NCCL.check_status(7)
    assert in_progress.value.args == (7,)
    with pytest.raises(NCCL.NcclError, match="remote process exited"):
        NCCL.check_status(6)


@no_gpu
def test_without_a_device_nothing_is_tried():
    assert not NcclCommunicator.available()
    with pytest.raises(Unsupported, match="cuda:0 is none that this machine has"):
        NcclCommunicator(new_unique_id(), 0, 1, torch.device("cuda:0"), timeout_s=10)


def test_a_device_that_is_none():
    with pytest.raises(Unsupported, match="cpu is none"):
        CudaDevice(torch.device("cpu"))


@no_gpu
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_a_real_refusal_becomes_our_error(rank, size):
    """A stand-in for the device lets the constructor come as far as NCCL, which finds no driver."""
    cuda = FakeCuda(released_by=threading.Event())
    message = f"NCCL rank {rank} of {size} on cpu .*NcclError: NCCL_ERROR_UNHANDLED_CUDA_ERROR"
    with pytest.raises(PeerLost, match=message):
        NcclCommunicator(new_unique_id(), rank, size, cuda.device, timeout_s=60, cuda=cuda)
