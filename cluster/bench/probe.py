"""What the machine can do: bytes read from memory per second and operations per second, with the threads of the run.

Run as a program, because the arrays it reads would count to a benchmark's own memory, and its threads would stay:

    python -m cluster.bench.probe THREADS
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

_READ_BYTES = 2**29  # far beyond any last-level cache
_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Measured limits of ``num_threads`` threads together; the best of several rounds.

    Attributes:
        read_bytes_per_s: of a sum over an array of 512 MiB.
        ops_per_s: multiplications and additions by number format, of a product of large square matrices.
    """

    num_threads: int
    read_bytes_per_s: float
    ops_per_s: dict[str, float]


def probe(num_threads: int) -> Machine:
    """Measures in a process of its own; takes about two seconds."""
    command = [sys.executable, "-m", "cluster.bench.probe", str(num_threads)]
    return Machine(**json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def measure(num_threads: int) -> Machine:
    """Measures in this process, and leaves torch with ``num_threads``."""
    import torch

    torch.set_num_threads(num_threads)
    array = torch.ones(_READ_BYTES // 4)
    read_s = _best(array.sum)
    float32 = torch.randn(1024, 1024)
    bfloat16 = float32.to(torch.bfloat16)
    # torch takes its fast path for int8 only where the right-hand side is a transposed view.
    int8, weight = torch.ones(512, 4096, dtype=torch.int8), torch.ones(4096, 4096, dtype=torch.int8).t()
    square = 2.0 * 1024**3
    return Machine(
        num_threads=num_threads,
        read_bytes_per_s=_READ_BYTES / read_s,
        ops_per_s={
            "float32": square / _best(lambda: float32 @ float32),
            "bfloat16": square / _best(lambda: bfloat16 @ bfloat16),
            "int8": 2.0 * 512 * 4096**2 / _best(lambda: torch._int_mm(int8, weight)),
        },
    )


def _best(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    print(json.dumps(asdict(measure(int(sys.argv[1])))))
