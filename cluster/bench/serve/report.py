"""A run as plain data: what is written to a file, drawn as HTML, and compared with another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.bench.serve.figures import (
    MEASURES,
    Milliseconds,
    Targets,
    Window,
    figures_of,
    quantiles_ms,
    tokens_in,
    values_s,
)
from cluster.bench.serve.load_run import Limits, Recording
from cluster.bench.serve.record import Record
from cluster.bench.stamp import stamp
from cluster.errors import ConfigError

KIND = "cluster bench serve"
_NUM_BUCKETS = 60

Report = dict[str, Any]


def make_report(recording: Recording, limits: Limits, targets: Targets, settings: dict[str, Any]) -> Report:
    """
    Args:
        settings: what was asked for, in words of the caller's.

    Raises:
        ConfigError: nothing was sent after the warm-up.
    """
    # Where all requests were sent before the time was up, what they took is part of what is measured.
    last_s = max((record.ended_s or 0.0 for record in recording.records), default=0.0)
    window = Window(start_s=limits.warm_up_s, end_s=limits.duration_s or last_s)
    records = recording.records
    classes = sorted({record.priority for record in records})
    all_tokens = tokens_in(records, window)
    by_class = {priority.name: [record for record in records if record.priority == priority] for priority in classes}
    return {
        "kind": KIND,
        **stamp(),
        "model": recording.model.name,
        "settings": settings,
        "measured_s": round(window.length_s, 3),
        "targets_ms": {"all": targets.common, **{name.name: limits for name, limits in targets.by_class.items()}},
        "total": asdict(figures_of(records, window, targets, all_tokens=all_tokens)),
        "classes": {
            name: asdict(figures_of(of_class, window, targets, all_tokens=all_tokens))
            for name, of_class in by_class.items()
        },
        "distributions": {
            name: {
                measure: quantiles_ms(values_s((one for one in of_class if one.due_s in window), measure))
                for measure in MEASURES
            }
            for name, of_class in by_class.items()
        },
        "series": {name: _series(of_class, last_s) for name, of_class in by_class.items()},
    }


def _series(records: Sequence[Record], end_s: float) -> dict[str, Any]:
    """How the run went, in as many pieces of time as a plot shows."""
    width_s = max(end_s / _NUM_BUCKETS, 0.5)
    count = int(end_s / width_s) + 1
    due, failed, tokens, running = ([0.0] * count for _ in range(4))
    ttfts: list[list[float]] = [[] for _ in range(count)]
    for record in records:
        first = min(int(record.due_s / width_s), count - 1)
        due[first] += 1 / width_s
        if record.ttft_s is not None:
            ttfts[first].append(record.ttft_s)
        if not record.ok:
            failed[first] += 1 / width_s
        scale = record.num_new_tokens / max(1, sum(record.counts)) / width_s
        for time_s, number in zip(record.times_s, record.counts, strict=True):
            tokens[int(time_s / width_s)] += number * scale
        for bucket in range(first, int((record.ended_s or end_s) / width_s) + 1):
            running[bucket] += 1
    spreads = [Milliseconds.of(values) for values in ttfts]
    return {
        "at_s": [round(index * width_s, 3) for index in range(count)],
        "due_per_s": [round(value, 3) for value in due],
        "failed_per_s": [round(value, 3) for value in failed],
        "tokens_per_s": [round(value, 3) for value in tokens],
        "running": running,
        "ttft_p50_ms": [None if spread is None else spread.p50 for spread in spreads],
        "ttft_p99_ms": [None if spread is None else spread.p99 for spread in spreads],
    }


def write_report(report: Report, path: Path) -> None:
    """
    Raises:
        ConfigError: the file cannot be written.
    """
    _write(path, json.dumps(report, indent=1) + "\n")


def write_page(page: str, path: Path) -> None:
    """
    Raises:
        ConfigError: the file cannot be written.
    """
    _write(path, page)


def read_report(path: Path) -> Report:
    """
    Raises:
        ConfigError: the file cannot be read, or is no report.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a report: {error}") from None
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise ConfigError(f"{path} is no report of `{KIND}`: make one with --save")
    return report


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
