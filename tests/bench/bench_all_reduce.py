"""How long two ranks of one host take to sum a tensor: our communicators, and gloo's own all-reduce.

    python tests/bench/bench_all_reduce.py [--kib 4,16,64,1024] [--rounds 5] [--repeats 400] [--ranks 2]

Every round measures all of them in turn, so that what else the machine does falls on all. Ranks meet at a barrier
before each sum; the time is that of the sum alone, on rank 0, in microseconds. `spread` is how far the rounds' medians
lie apart.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from cluster.distributed.gloo import GlooCommunicator, host_store
from cluster.distributed.shm import ShmCommunicator, segment_path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from stamp import report

TIMEOUT_S = 60.0


class PlainGloo:
    """gloo as torch gives it: its own choice of algorithm and order."""

    def __init__(self, port: int, rank: int, size: int) -> None:
        store = PrefixStore("plain", TCPStore("127.0.0.1", port, wait_for_workers=False))
        options = ProcessGroupGloo._Options()
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=TIMEOUT_S)
        self._group = ProcessGroupGloo(store, rank, size, options)

    def all_reduce_(self, x: Tensor) -> None:
        self._group.allreduce([x]).wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", default="4,16,64,1024", help="sizes of the tensor")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=400, help="sums per round, communicator and size")
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    kibs = [int(kib) for kib in arguments.kib.split(",")]
    store, path = host_store("127.0.0.1"), segment_path()
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    given = (path, store.port, arguments.ranks, kibs, arguments.rounds, arguments.repeats, results)
    ranks = [context.Process(target=measure, args=(rank, *given)) for rank in range(arguments.ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit("a rank has failed")
    report({"ranks": arguments.ranks, "unit": "us", "all_reduce": results.get()})


def measure(
    rank: int, path: str, port: int, size: int, kibs: list[int], rounds: int, repeats: int, results: Any
) -> None:
    torch.set_num_threads(1)
    shm = ShmCommunicator(path, rank, size, timeout_s=TIMEOUT_S)
    gloo = GlooCommunicator("127.0.0.1", port, "ordered", rank, size, timeout_s=TIMEOUT_S)
    sums = {"shm": shm.all_reduce_, "gloo": PlainGloo(port, rank, size).all_reduce_, "gloo_ordered": gloo.all_reduce_}
    taken: dict[tuple[str, int], list[list[float]]] = {(name, kib): [] for name in sums for kib in kibs}
    for round_number in range(-1, rounds):  # the first is not counted
        for kib in kibs:
            for name, all_reduce in sums.items():
                times = timed(shm, all_reduce, torch.zeros(kib * 256), repeats)
                if round_number >= 0:
                    taken[name, kib].append(times)
    if rank == 0:
        results.put(summary(taken, kibs))
    shm.barrier()
    gloo.close()
    shm.close()


def timed(meeting: ShmCommunicator, all_reduce: Callable[[Tensor], None], x: Tensor, repeats: int) -> list[float]:
    """Microseconds of every call."""
    times = []
    for _ in range(repeats):
        meeting.barrier()
        start = time.perf_counter_ns()
        all_reduce(x)
        times.append((time.perf_counter_ns() - start) / 1e3)
    return times


def summary(taken: dict[tuple[str, int], list[list[float]]], kibs: list[int]) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for kib in kibs:
        figures: dict[str, Any] = {}
        for (name, size), rounds in taken.items():
            if size != kib:
                continue
            times = sorted(time_us for one in rounds for time_us in one)
            medians = [statistics.median(one) for one in rounds]
            figures[name] = {
                "p50": round(statistics.median(times), 2),
                "p99": round(times[len(times) * 99 // 100], 2),
                "spread": round((max(medians) - min(medians)) / statistics.median(medians), 3),
            }
        figures["gloo_over_shm_p50"] = round(figures["gloo"]["p50"] / figures["shm"]["p50"], 1)
        sizes[f"{kib} KiB"] = figures
    return sizes


if __name__ == "__main__":
    main()
