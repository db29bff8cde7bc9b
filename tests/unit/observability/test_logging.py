"""Log lines as programs and people read them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from cluster.observability.logging import configure_logging


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    logger = logging.getLogger("cluster")
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


def test_json_lines_hold_fields_and_traceback(capsys: pytest.CaptureFixture[str]):
    configure_logging("info", "json")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("cluster.serve").exception("replica %s\nlost", "r1", extra={"model": "demo"})
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert entry["message"] == "replica r1\nlost" and entry["level"] == "error"
    assert entry["logger"] == "cluster.serve" and entry["model"] == "demo"
    assert "ValueError: broken" in entry["traceback"]


def test_what_is_less_severe_is_not_written(capsys: pytest.CaptureFixture[str]):
    configure_logging("warning", "text")
    logging.getLogger("cluster.x").info("quiet")
    logging.getLogger("cluster.x").warning("loud")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("WARNING cluster.x: loud")


def test_configuring_twice_writes_once(capsys: pytest.CaptureFixture[str]):
    configure_logging("info", "text")
    configure_logging("info", "text")
    logging.getLogger("cluster.x").info("once")
    assert len(capsys.readouterr().err.splitlines()) == 1
