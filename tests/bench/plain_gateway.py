"""A gateway as a plain process, for benchmarks: the production one, told on its command line where its replicas are.

python tests/bench/plain_gateway.py --replica replica-0=127.0.0.1:7000 --config '{"port": 0}'
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal

import uvloop
from fake_engine import SECRET
from pydantic import TypeAdapter

from cluster.checkpoint import resolve_checkpoint
from cluster.core.config import ClassesConfig
from cluster.gateway.catalog import ServedModel
from cluster.gateway.config import GatewayConfig
from cluster.gateway.replica_link import ReplicaAddress
from cluster.gateway.server import Gateway


async def serve(config: GatewayConfig, classes: ClassesConfig, checkpoint: str, replicas: list[ReplicaAddress]) -> None:
    """Prints the address, and serves model "test" until the process is killed. SIGUSR1 makes it print how many tasks
    its event loop has."""
    model = ServedModel("test", resolve_checkpoint(checkpoint, weights=False))
    gateway = Gateway(config, [model], secret=SECRET, classes=classes)
    port = await gateway.start()
    gateway.set_replicas("test", replicas)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: print(len(asyncio.all_tasks()), flush=True))
    print(f"{config.host}:{port}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replica", action="append", default=[], metavar="ID=ADDRESS")
    parser.add_argument("--checkpoint", default="demo", help="whose tokenizer is used: as for 'cluster serve'")
    parser.add_argument("--config", default="{}", help="the section gateway of the configuration, as JSON")
    parser.add_argument("--classes", default="{}", help="the section classes, as JSON")
    arguments = parser.parse_args()
    given = {"port": 0, "http_port": None} | json.loads(arguments.config)
    config = TypeAdapter(GatewayConfig).validate_python(given)
    classes = TypeAdapter(ClassesConfig).validate_python(json.loads(arguments.classes))
    replicas = [ReplicaAddress(*replica.split("=", 1)) for replica in arguments.replica]
    uvloop.run(serve(config, classes, arguments.checkpoint, replicas))


if __name__ == "__main__":
    main()
