"""Structured logs on standard error. What is logged are ids, counts and causes; prompts and completions never are."""

from __future__ import annotations

import json
import logging
import sys
from typing import Literal

# What every LogRecord has; anything else was given as ``extra`` and belongs into the line.
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, the fields given as ``extra``, and the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """One readable line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")


def configure_logging(level: str, style: Literal["json", "text"]) -> None:
    """Sends what the package ``cluster`` logs to standard error; other packages' loggers are left as they are.

    Args:
        level: least severity, e.g. ``"warning"``.
        style: json or text.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logger = logging.getLogger("cluster")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
