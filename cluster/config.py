"""The one configuration tree, and its loader. The same file runs a laptop, a Ray cluster and a chart."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from cluster.errors import ConfigError
from cluster.gateway.config import GatewayConfig
from cluster.serve.config import LoggingConfig, ModelConfig, RayConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Everything that can be set.

    Attributes:
        models: what is served; at least one.
        gateway: where clients connect.
        ray: which Ray to run on.
        logging: structured logs.
    """

    models: tuple[ModelConfig, ...]
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
