"""A replica with its real engine as a plain process, without Ray, for benchmarks.

python tests/bench/plain_replica.py --model demo --engine '{"scheduler": {"max_num_seqs": 16}}'
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from pathlib import Path

import uvloop
from fake_engine import SECRET
from pydantic import TypeAdapter

from cluster.cli.bench_options import checkpoint_directory
from cluster.core.config import ClassesConfig
from cluster.distributed.config import ParallelConfig
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.serve.replica_server import ReplicaServer
from cluster.worker.config import WorkerConfig
from cluster.worker.executors import create_executor


async def serve(
    replica_id: str, checkpoint: Path, worker: WorkerConfig, engine: EngineConfig, classes: ClassesConfig
) -> None:
    """Prints the address; serves until SIGTERM, which ends it at once."""

    def create_engine() -> Engine:
        scheduler = engine.scheduler
        executor = create_executor(
            checkpoint, worker, ParallelConfig(), scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        )
        return Engine(executor, engine, classes=classes)

    server = ReplicaServer(create_engine, replica_id=replica_id, model="test", secret=SECRET, limits=engine)
    print(f"127.0.0.1:{await server.start()}", flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replica-id", default="replica-0")
    parser.add_argument("--model", help="as for 'cluster serve'")
    parser.add_argument("--shape", help="random weights in a shape by name, as for 'cluster bench engine'")
    parser.add_argument("--worker", default="{}", help="the model's section worker, as JSON")
    parser.add_argument("--engine", default="{}", help="the model's section engine, as JSON")
    parser.add_argument("--classes", default="{}", help="the section classes, as JSON")
    arguments = parser.parse_args()
    worker = json.loads(arguments.worker)
    if arguments.shape is not None:
        worker["load_format"] = "dummy"
    with checkpoint_directory(arguments.model, arguments.shape) as checkpoint:
        uvloop.run(
            serve(
                arguments.replica_id,
                checkpoint,
                TypeAdapter(WorkerConfig).validate_python(worker),
                TypeAdapter(EngineConfig).validate_python(json.loads(arguments.engine)),
                TypeAdapter(ClassesConfig).validate_python(json.loads(arguments.classes)),
            )
        )


if __name__ == "__main__":
    main()
