"""What can be found wrong before any process is started: within milliseconds, but for what the Hub has to send."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cluster.checkpoint import is_hub_id, resolve_checkpoint
from cluster.config import ClusterConfig
from cluster.errors import CheckpointError, ConfigError
from cluster.gateway.config import DEFAULT_HTTP_PORT, GatewayConfig
from cluster.serve.addresses import join_host_port
from cluster.serve.gateway_ports import probe_port


def check_checkpoint(path: str) -> Path:
    """The directory of a checkpoint that looks whole: configuration, tokenizer and weights are there.

    Raises:
        CheckpointError: a file is missing or is not JSON; the message names it.
    """
    directory = resolve_checkpoint(path)
    for name in ("config.json", "tokenizer.json"):
        file = directory / name
        try:
            json.loads(file.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no {name}") from None
        except ValueError as error:
            raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory} has no *.safetensors; other weight formats are not read")
    return directory


def check_ports(config: GatewayConfig) -> None:
    """Raises ConfigError where a gateway could not listen."""
    _check_row(config, config.port, option="--port", field="gateway.port")
    if config.http_port not in (None, DEFAULT_HTTP_PORT):  # where the default is taken, another is
        _check_row(config, config.http_port, option="--http-port", field="gateway.http_port")


def _check_row(config: GatewayConfig, first: int, *, option: str, field: str) -> None:
    for port in range(first, first + config.replicas) if first else (0,):
        try:
            probe_port(config.host, port)
        except OSError as error:
            raise ConfigError(
                f"the gateway cannot listen on {join_host_port(config.host, port)}: {error.strerror or error}. Stop "
                f"what listens there, or choose another with {option} (0 takes a free one)",
                field=field,
            ) from None


def check_machine(config: ClusterConfig, on_stage: Callable[[str], None]) -> None:
    """Everything above, for a cluster that will run on this machine.

    Args:
        on_stage: told what comes next. A checkpoint of the Hub is fetched here, which may take long.
    """
    check_ports(config.gateway)
    for path in dict.fromkeys(model.path for model in config.models):
        on_stage(f"downloading {path}" if is_hub_id(path) else f"checking {path}")
        check_checkpoint(path)
