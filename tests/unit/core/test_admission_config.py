"""What a configuration file may say of classes, queues and tenants, and what it is told where it may not."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import ClusterConfig, parse_config
from cluster.core.config import ClassConfig, TenantConfig
from cluster.errors import ConfigError


def parse(**tree: Any) -> ClusterConfig:
    return parse_config({"models": [{"name": "m", "path": "/checkpoint"}], **tree})


def test_classes_have_defaults():
    classes = parse().classes
    assert [(each.target_ms, each.share) for each in classes.by_priority().values()] == [
        (200, 0.4), (500, 0.3), (1000, 0.2), (None, 0.1),
    ]  # fmt: skip


def test_one_class_may_be_set_alone():
    classes = parse(classes={"p0": {"share": 0.25, "target_ms": 50, "max_e2e_ms": 900}, "p3": {"share": 0.2}}).classes
    assert classes.p0 == ClassConfig(share=0.25, target_ms=50, max_e2e_ms=900)
    assert classes.p3 == ClassConfig(share=0.2)
    assert classes.p1 == ClassConfig(share=0.3, target_ms=500)


def test_tenants_and_bounds():
    gateway = parse(
        gateway={
            "admission": {"max_queued_requests": 10},
            "tenants": [{"name": "acme", "tokens_per_min": 1000, "models": ["m"], "max_priority": "P2"}],
        }
    ).gateway
    assert gateway.admission.max_queued_requests == 10
    assert gateway.tenants == (TenantConfig(name="acme", tokens_per_min=1000, models=("m",), max_priority="P2"),)


@pytest.mark.parametrize(
    ("tree", "field", "message"),
    [
        ({"classes": {"p0": {"share": 0.9}}}, "classes", r"add up to 1\.5"),
        ({"classes": {"p2": {"share": 0}}}, "classes.p2.share", "above 0"),
        ({"classes": {"p2": {"share": 0.1, "target_ms": 0}}}, "classes.p2.target_ms", "above 0"),
        ({"classes": {"p2": {"share": 0.1, "max_e2e_ms": 0}}}, "classes.p2.max_e2e_ms", "above 0"),
        ({"classes": {"p2": {"share": 0.1, "max_queued_tokens": 0}}}, "classes.p2.max_queued_tokens", "at least 1"),
        ({"classes": {"p2": {"target_ms": 10}}}, "classes.p2.share", "is required"),
        ({"classes": {"p4": {}}}, "classes.p4", "known here: p0, p1, p2, p3"),
        ({"gateway": {"admission": {"max_queued_tokens": 0}}}, "gateway.admission.max_queued_tokens", "at least 1"),
        ({"gateway": {"tenants": [{"name": ""}]}}, "gateway.tenants.0.name", "must name a tenant"),
        ({"gateway": {"tenants": [{"name": "a", "requests_per_s": 0}]}}, "gateway.tenants.0.requests_per_s", "above 0"),
        ({"gateway": {"tenants": [{"name": "a"}, {"name": "a"}]}}, "gateway.tenants", "two are called 'a'"),
        ({"gateway": {"tenants": [{"name": "a", "max_priority": "P4"}]}}, "gateway.tenants.0.max_priority", "P3"),
    ],
)
def test_what_is_wrong_is_named(tree: dict[str, Any], field: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(**tree)
    assert caught.value.field == field
