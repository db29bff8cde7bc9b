"""Rendering of the chart, with helm or with what stands in for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[3]
CHART = REPO / "helm"
BESIDE = REPO.parent / "shared"

Rendered = dict[str, dict[str, Any]]
Render = Callable[..., Rendered]


def find_renderer() -> str | None:
    """A command with helm's ``template``: CLUSTER_TEST_HELM, helm itself, or the small renderer beside the checkout."""
    beside = BESIDE / "tools" / "helm-lite" / "helm-lite"
    return os.environ.get("CLUSTER_TEST_HELM") or shutil.which("helm") or (str(beside) if beside.is_file() else None)


@pytest.fixture(scope="session")
def helm_template() -> Callable[..., str]:
    """Runs ``RENDERER template release CHART ARGS...``; its output."""
    renderer = find_renderer()
    if renderer is None:
        pytest.skip("no helm on PATH and none named by CLUSTER_TEST_HELM")

    def run(*args: str | Path) -> str:
        command = [renderer, "template", "release", CHART, "-n", "models", *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def render(helm_template, tmp_path) -> Render:
    """``render(values)``: the chart's objects by kind, with ``values`` laid over its own."""

    def render(values: dict[str, Any] | None = None) -> Rendered:
        over = tmp_path / "values.yaml"
        over.write_text(yaml.safe_dump(values or {}))
        objects = [found for found in yaml.safe_load_all(helm_template("-f", over)) if found]
        by_kind = {found["kind"]: found for found in objects}
        assert len(by_kind) == len(objects), "two objects of one kind"
        return by_kind

    return render


@pytest.fixture
def values() -> dict[str, Any]:
    """The chart's default values."""
    return yaml.safe_load((CHART / "values.yaml").read_text())
