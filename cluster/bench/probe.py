"""What the machine can do: bytes read from memory per second and operations per second, with the threads of the run.

Run as a program, because the arrays it reads would count to a benchmark's own memory, and its threads would stay:

    python -m cluster.bench.probe cpu|cuda THREADS
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

Device = Literal["cpu", "cuda"]

_READ_BYTES = {"cpu": 2**29, "cuda": 2**31}  # far beyond any last-level cache
_SIZE = {"cpu": 1024, "cuda": 8192}
_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Measured limits; the best of several rounds.

    Attributes:
        device: cpu or cuda.
        num_threads: that worked together, on a CPU.
        read_bytes_per_s: of a sum over a large array.
        ops_per_s: multiplications and additions by number format, of a product of large square matrices.
    """

    device: Device
    num_threads: int
    read_bytes_per_s: float
    ops_per_s: dict[str, float]

    def best_of(self, other: Machine) -> Machine:
        """The higher limit of two measurements: what else the machine does can only lower them."""
        return replace(
            self,
            read_bytes_per_s=max(self.read_bytes_per_s, other.read_bytes_per_s),
            ops_per_s={name: max(rate, other.ops_per_s[name]) for name, rate in self.ops_per_s.items()},
        )


def probe(device: Device, num_threads: int) -> Machine:
    """Measures in a process of its own; takes about two seconds on a CPU."""
    command = [sys.executable, "-m", "cluster.bench.probe", device, str(num_threads)]
    return Machine(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))


def measure(device: Device, num_threads: int) -> Machine:
    """Measures in this process, and leaves torch with ``num_threads``."""
    torch.set_num_threads(num_threads)
    array = torch.ones(_READ_BYTES[device] // 4, device=device)
    read_s = _best(array.sum, device)
    del array
    size = _SIZE[device]
    ops = 2.0 * size**3
    float32 = torch.randn(size, size, device=device)
    bfloat16 = float32.to(torch.bfloat16)
    int8 = torch.ones(size, size, dtype=torch.int8, device=device)
    return Machine(
        device=device,
        num_threads=num_threads,
        read_bytes_per_s=_READ_BYTES[device] / read_s,
        ops_per_s={
            "float32": ops / _best(lambda: float32 @ float32, device),
            "bfloat16": ops / _best(lambda: bfloat16 @ bfloat16, device),
            # The fast path needs a transposed view on the right.
            "int8": ops / _best(lambda: torch._int_mm(int8, int8.t()), device),
        },
    )


def _best(call: Callable[[], object], device: Device) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    times = []
    for _ in range(_ROUNDS):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    print(json.dumps(asdict(measure("cuda" if sys.argv[1] == "cuda" else "cpu", int(sys.argv[2])))))
