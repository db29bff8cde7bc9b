"""What the ranks of NCCL's tests do, and a program that is one rank of two on one device.

    python nccl_rank.py RANK TIMEOUT_S SCENARIO

Rank 0 prints its unique id, rank 1 reads it from standard input. "operations", "capture" and "order" check what they
say. "loss" prints "joined", waits for a line and does one all-reduce. At the end a rank prints "done" and waits for a
line, since who leaves cuts off what a peer still reads; or it prints "lost" and why.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cluster.distributed.communicator import Communicator, PeerLost
from cluster.distributed.nccl import NcclCommunicator, new_unique_id

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (3, 5), (257,), (64, 1024)]


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """A rank's tensor as all ranks know it: integers so small that their sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(0, 5, shape, generator=generator).to(dtype).to(device)


def check_operations(communicator: Communicator, device: torch.device) -> None:
    """Every operation, against what all ranks' tensors make of it."""
    rank, size = communicator.rank, communicator.size
    for shape in SHAPES:
        for dtype in FLOATS:
            x = part(rank, shape, dtype, device)
            communicator.all_reduce_(x)
            assert torch.equal(x, sum(part(other, shape, dtype, device) for other in range(size))), (shape, dtype)
        for dtype in (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool):
            parts = [part(other, shape, dtype, device) for other in range(size)]
            out = torch.zeros((size, *shape), dtype=dtype, device=device)
            communicator.all_gather(parts[rank], out)
            assert torch.equal(out, torch.stack(parts)), (shape, dtype)
            for root in range(size):
                x = parts[rank].clone()
                communicator.broadcast_(x, root)
                assert torch.equal(x, parts[root]), (shape, dtype)
            outgoing = [part(other, (size, *shape), dtype, device) for other in range(size)]
            communicator.all_to_all(outgoing[rank], out)
            assert torch.equal(out, torch.stack([other[rank] for other in outgoing])), (shape, dtype)
            for sender in range(size - 1):
                if rank == sender:
                    communicator.send(parts[sender], sender + 1)
                elif rank == sender + 1:
                    received = torch.zeros_like(parts[sender])
                    communicator.recv(received, sender)
                    assert torch.equal(received, parts[sender]), (shape, dtype)
    communicator.barrier()
    communicator.check()


def check_capture(communicator: Communicator, device: torch.device) -> None:
    """Operations captured into a graph while the watching thread asks about work that is in flight; then replayed."""
    rank, size = communicator.rank, communicator.size
    shape, dtype = (16, 64), torch.bfloat16
    x, gathered = part(rank, shape, dtype, device), torch.zeros((size, *shape), dtype=dtype, device=device)
    side, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    communicator.all_reduce_(x)
    communicator.all_gather(x, gathered)
    torch.cuda._sleep(1)  # a kernel's first launch loads it, which is forbidden in a capture
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        communicator.all_reduce_(x)
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000_000)  # about a second
            communicator.check()  # a mark behind it
        time.sleep(0.3)  # during which the mark is asked for; that must not break the capture
        communicator.all_gather(x, gathered)
    for seed in range(1, 6):
        x.copy_(part(rank, shape, dtype, device, seed))
        graph.replay()
        communicator.check()
        total = sum(part(other, shape, dtype, device, seed) for other in range(size))
        assert torch.equal(x, total)
        assert torch.equal(gathered, torch.stack([total] * size))
    communicator.check()


def check_order(communicator: Communicator, device: torch.device) -> None:
    """A batch-invariant communicator: bitwise the sum in the order of the ranks, whatever shares the tensor."""
    rank, size = communicator.rank, communicator.size
    generator = torch.Generator().manual_seed(5)
    for dtype in FLOATS:
        parts = torch.randn(size, 300, generator=generator).to(dtype).to(device)
        total = parts[0].float()
        for other in range(1, size):
            total = total + parts[other].float()
        for count in (1, 7, 300):
            x = parts[rank, :count].clone()
            communicator.all_reduce_(x)
            assert torch.equal(x, total[:count].to(dtype)), (dtype, count)


def main(rank: int, timeout_s: float, scenario: str) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    if rank == 0:
        unique_id = new_unique_id()
        print(unique_id.hex(), flush=True)
    else:
        unique_id = bytes.fromhex(sys.stdin.readline())

    def create(**options: bool) -> NcclCommunicator:
        return NcclCommunicator(unique_id, rank, 2, device, timeout_s=timeout_s, build_timeout_s=60, **options)

    scenarios: dict[str, Callable[[], None]] = {
        "operations": lambda: check_operations(create(), device),
        "capture": lambda: check_capture(create(), device),
        "order": lambda: check_order(create(batch_invariant=True), device),
        "loss": lambda: loss(create(), device),
    }
    try:
        scenarios[scenario]()
        print("done", flush=True)
        sys.stdin.readline()
    except PeerLost as error:
        print("lost", error, flush=True)


def loss(communicator: NcclCommunicator, device: torch.device) -> None:
    print("joined", flush=True)
    sys.stdin.readline()
    communicator.all_reduce_(torch.ones(1 << 20, device=device))
    communicator.check()
    torch.cuda.synchronize(device)  # would never return
    communicator.check()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
