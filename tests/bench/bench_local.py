"""The local cluster as a user meets it: start-up time, idle memory, time to first token at one client, throughput and
the gateway's CPU time per token at 64.

    python tests/bench/bench_local.py [--model demo] [--requests 200]

Memory is the sum of PSS over every process that the cluster started, dashboard included, after it has been idle for
``--idle-s`` seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cluster.client import AsyncClient, Client
from cluster.core.request import SamplingParams
from cluster.errors import ClusterError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from stamp import report

PROMPT = "import os\n\n\ndef read_lines(path):\n    "


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_ready(client: Client, server: subprocess.Popen, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit code {server.returncode}")
        try:
            if any(replica.state == "ready" for model in client.models() for replica in model.replicas):
                return
        except ClusterError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server did not become ready")


def memory_by_process(pid: int) -> dict[str, float]:
    """PSS in MiB by process title, largest first."""
    root = psutil.Process(pid)
    usage: dict[str, float] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            pss = process.memory_full_info().pss / 2**20
            command = process.cmdline()
        except psutil.Error:
            continue
        title = next((part for part in command if "::" in part), " ".join(Path(part).name for part in command[:3]))
        usage[title[:60]] = round(usage.get(title[:60], 0.0) + pss, 1)
    return dict(sorted(usage.items(), key=lambda item: -item[1]))


def time_to_first_token_ms(client: Client, count: int) -> list[float]:
    times = []
    for index in range(count):
        start = time.perf_counter()
        for _ in client.stream(PROMPT, SamplingParams(max_tokens=1, temperature=0.0, seed=index)):
            times.append((time.perf_counter() - start) * 1e3)
            break
    return times


def gateway_cpu_s(pid: int) -> float:
    (gateway,) = (
        process for process in psutil.Process(pid).children(recursive=True) if ":Gateway" in " ".join(process.cmdline())
    )
    times = gateway.cpu_times()
    return times.user + times.system


async def stream_together(address: str, num_streams: int, max_tokens: int) -> int:
    """Runs greedy streams at once; the number of tokens that arrived."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)

    async def read(client: AsyncClient) -> int:
        return sum([len(chunk.token_ids) async for chunk in client.stream(PROMPT, sampling)])

    async with AsyncClient(address) as client:
        return sum(await asyncio.gather(*(read(client) for _ in range(num_streams))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--idle-s", type=float, default=20.0)
    args = parser.parse_args()
    port = free_port()
    command = [Path(sys.executable).with_name("cluster"), "serve", args.model, "--port", str(port)]
    start = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with Client(f"127.0.0.1:{port}") as client:
            wait_ready(client, server)
            ready_s = time.monotonic() - start
            time_to_first_token_ms(client, 10)  # what a first request compiles or caches is not the steady state
            times = time_to_first_token_ms(client, args.requests)
            time.sleep(args.idle_s)
            memory = memory_by_process(server.pid)
        cpu_s, began = gateway_cpu_s(server.pid), time.perf_counter()
        num_tokens = asyncio.run(stream_together(f"127.0.0.1:{port}", num_streams=64, max_tokens=256))
        together_s = time.perf_counter() - began
        cpu_s = gateway_cpu_s(server.pid) - cpu_s
    finally:
        stop = time.monotonic()
        server.send_signal(signal.SIGINT)
        server.wait(60)
    report(
        {
            "ready_s": round(ready_s, 2),
            "stop_s": round(time.monotonic() - stop, 2),
            "ttft_p50_ms": round(statistics.median(times), 2),
            "ttft_p99_ms": round(statistics.quantiles(times, n=100)[98], 2),
            "tokens_per_s_at_64": round(num_tokens / together_s, 1),
            "gateway_cpu_us_per_token_at_64": round(1e6 * cpu_s / num_tokens, 1),
            "idle_pss_mib": round(sum(memory.values()), 1),
            "idle_pss_by_process_mib": memory,
        }
    )


if __name__ == "__main__":
    main()
