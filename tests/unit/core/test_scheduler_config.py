"""What a configuration file may say of the scheduler, and what it is told where it may not."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import parse_config
from cluster.core.config import SchedulerConfig
from cluster.errors import ConfigError


def parse(**scheduler: Any) -> SchedulerConfig:
    model = {"name": "m", "path": "/checkpoint", "engine": {"scheduler": scheduler}}
    return parse_config({"models": [model]}).models[0].engine.scheduler


def test_sizes_and_targets():
    config = parse(park_bytes="2GiB", target_itl_ms=40)
    assert (config.park_bytes, config.target_itl_ms) == (2**31, 40)


@pytest.mark.parametrize(
    ("scheduler", "field", "message"),
    [
        ({"target_itl_ms": 0}, "target_itl_ms", "above 0, or null"),
        ({"park_bytes": -1}, "park_bytes", "at least 0"),
        ({"park_bytes": "much"}, "park_bytes", "no size"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 7}, "max_num_batched_tokens", "at least max_num_seqs, 8"),
    ],
)
def test_what_is_wrong_is_named(scheduler: dict[str, Any], field: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(**scheduler)
    assert caught.value.field == f"models.0.engine.scheduler.{field}"
