"""How long a replica made of shards is away after one of its processes was killed.

Starts ``cluster serve`` with the embedded model; then, as often as asked, loads it with streams, kills one process of
the group (the shards and the engine in turns), ends the load, and takes the time until every process of the group is
gone, and until a request is served again.

    python tests/bench/bench_group_recovery.py --tp 2 --kills 9
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from stamp import report

from cluster.client import Client
from cluster.core.request import SamplingParams
from cluster.errors import ClusterError

_TITLES = ("ray::Shard:", "ray::ServeReplica:cluster:model-")
_LONG = SamplingParams(max_tokens=900, ignore_eos=True)
_LOOK_S = 0.002
_CALL_S = 0.05  # between calls; more of them would take the cores that the new group needs
_TIMEOUT_S = 120.0


def group(server: psutil.Process) -> list[psutil.Process]:
    """Shards and engine of the one replica."""
    found = []
    for process in server.children(recursive=True):
        with suppress(psutil.Error):
            if any(title in " ".join(process.cmdline()) for title in _TITLES):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def wait(condition: Callable[[], bool], began: float, look_s: float = _LOOK_S) -> float:
    """Seconds from ``began`` until ``condition`` holds."""
    while not condition():
        if time.monotonic() - began > _TIMEOUT_S:
            raise TimeoutError(f"nothing within {_TIMEOUT_S:g} s")
        time.sleep(look_s)
    return time.monotonic() - began


def serves(client: Client) -> bool:
    try:
        client.generate("def f(", SamplingParams(max_tokens=1))
    except ClusterError:
        return False
    return True


def run_stream(client: Client, started: threading.Barrier, stop: threading.Event) -> None:
    with suppress(ClusterError), client.stream("import ", _LONG) as stream:
        next(stream)
        started.wait()
        for _ in stream:
            if stop.is_set():
                return


def kill_one(server: psutil.Process, address: str, number: int, *, size: int, num_streams: int) -> dict[str, Any]:
    """One kill under load; ``number`` chooses the victim."""
    wait(lambda: len(group(server)) == size, time.monotonic())
    processes = group(server)
    victim = processes[number % size]
    stop, started = threading.Event(), threading.Barrier(num_streams + 1)
    # One attempt each: a client that waits between attempts would count its own patience.
    with Client(address, deadline_s=_TIMEOUT_S, max_attempts=1) as client:
        streams = [threading.Thread(target=run_stream, args=(client, started, stop)) for _ in range(num_streams)]
        for stream in streams:
            stream.start()
        started.wait(_TIMEOUT_S)
        title = " ".join(victim.cmdline()).strip()
        began = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        stop.set()
        gone_s = wait(lambda: not any(lives(process) for process in processes), began)
        serving_s = wait(lambda: serves(client), began, _CALL_S)
        for stream in streams:
            stream.join()
    return {"killed": title, "gone_s": round(gone_s, 3), "serving_s": round(serving_s, 2)}


def summary(values: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--streams", type=int, default=8)
    options = parser.parse_args()
    command = [Path(sys.executable).with_name("cluster"), "serve", "--tp", str(options.tp), "--pp", str(options.pp)]
    server = subprocess.Popen([*command, "--port", "0", "--no-dashboard", "--json"], stdout=subprocess.PIPE)
    size = options.tp * options.pp + 1
    try:
        address = json.loads(server.stdout.readline())["address"]
        server.stdout.readline()
        process = psutil.Process(server.pid)
        kills = []
        for number in range(options.kills):
            kills.append(kill_one(process, address, number, size=size, num_streams=options.streams))
            print(kills[-1], file=sys.stderr, flush=True)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    report(
        {
            "tp": options.tp,
            "pp": options.pp,
            "gone_s": summary([kill["gone_s"] for kill in kills]),
            "serving_s": summary([kill["serving_s"] for kill in kills]),
            "kills": kills,
        }
    )


if __name__ == "__main__":
    main()
