"""NCCL for the suite of tests of all communicators: ranks share the GPUs that there are, tensors come from the host."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from cluster.distributed.nccl import NcclCommunicator, new_unique_id


class HostTensors:
    """A Communicator for tensors in the host's memory, over one for tensors on a device. Calls return when done."""

    def __init__(self, communicator: NcclCommunicator) -> None:
        self.rank, self.size = communicator.rank, communicator.size
        self.barrier, self.check = communicator.barrier, communicator.check
        self.abort, self.close = communicator.abort, communicator.close
        self._communicator, self._device = communicator, communicator.device

    def all_reduce_(self, x: Tensor) -> None:
        x_device = x.to(self._device)
        self._communicator.all_reduce_(x_device)
        self._fetch(x_device, x)

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        out_device = out.to(self._device)
        self._communicator.all_gather(x.to(self._device), out_device)
        self._fetch(out_device, out)

    def all_to_all(self, x: Tensor, out: Tensor) -> None:
        out_device = out.to(self._device)
        self._communicator.all_to_all(x.to(self._device), out_device)
        self._fetch(out_device, out)

    def broadcast_(self, x: Tensor, root: int) -> None:
        x_device = x.to(self._device)
        self._communicator.broadcast_(x_device, root)
        self._fetch(x_device, x)

    def send(self, x: Tensor, to_rank: int) -> None:
        x_device = x.to(self._device)
        self._communicator.send(x_device, to_rank)
        self._fetch(x_device, x)

    def recv(self, out: Tensor, from_rank: int) -> None:
        out_device = out.to(self._device)
        self._communicator.recv(out_device, from_rank)
        self._fetch(out_device, out)

    def _fetch(self, x_device: Tensor, x: Tensor) -> None:
        torch.cuda.synchronize(self._device)
        self._communicator.check()
        x.copy_(x_device)


class NcclMeeting:
    """How ranks find each other. Made in a process that lives as long as they take to join."""

    def __init__(self) -> None:
        self.unique_id = new_unique_id()

    def join(self, rank: int, size: int, timeout_s: float) -> HostTensors:
        num_devices = torch.cuda.device_count()
        if num_devices < size:
            os.environ |= alone_on_its_host(rank)
        device = torch.device("cuda", rank % num_devices)
        torch.cuda.set_device(device)
        communicator = NcclCommunicator(
            self.unique_id, rank, size, device, timeout_s=timeout_s, build_timeout_s=60, batch_invariant=True
        )
        return HostTensors(communicator)


def alone_on_its_host(rank: int) -> dict[str, str]:
    """Environment in which NCCL takes a rank for alone on its host. It then allows several on one device, and has them
    talk over sockets."""
    return {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
