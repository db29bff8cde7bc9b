"""What a configuration file may say of the scheduler, and what it is told where it may not."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import parse_config
from cluster.core.config import ClassConfig, SchedulerConfig
from cluster.errors import ConfigError


def parse(**scheduler: Any) -> SchedulerConfig:
    model = {"name": "m", "path": "/checkpoint", "engine": {"scheduler": scheduler}}
    return parse_config({"models": [model]}).models[0].engine.scheduler


def test_classes_have_defaults():
    classes = parse().classes
    assert [(each.target_ms, each.share) for each in classes.by_priority().values()] == [
        (200, 0.4), (500, 0.3), (1000, 0.2), (None, 0.1),
    ]  # fmt: skip


def test_one_class_may_be_set_alone():
    classes = parse(classes={"p0": {"share": 0.25, "target_ms": 50}, "p3": {"share": 0.2}}).classes
    assert classes.p0 == ClassConfig(share=0.25, target_ms=50)
    assert classes.p3 == ClassConfig(share=0.2)
    assert classes.p1 == ClassConfig(share=0.3, target_ms=500)


def test_sizes_and_targets():
    config = parse(park_bytes="2GiB", target_itl_ms=40)
    assert (config.park_bytes, config.target_itl_ms) == (2**31, 40)


@pytest.mark.parametrize(
    ("scheduler", "field", "message"),
    [
        ({"classes": {"p0": {"share": 0.9}}}, "classes", r"add up to 1\.5"),
        ({"classes": {"p2": {"share": 0}}}, "classes.p2.share", "above 0"),
        ({"classes": {"p2": {"share": 0.1, "target_ms": 0}}}, "classes.p2.target_ms", "above 0"),
        ({"classes": {"p2": {"target_ms": 10}}}, "classes.p2.share", "is required"),
        ({"classes": {"p4": {}}}, "classes.p4", "known here: p0, p1, p2, p3"),
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
