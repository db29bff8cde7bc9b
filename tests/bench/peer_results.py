"""Figures of each engine from the rounds it ran, and how ours compare with the best of the others."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.bench.timeline import Timeline

Figures = dict[str, float]
OURS = "cluster"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure of ours over the best of the peers'.

    Attributes:
        figure: by the names of ``figures_of``.
        ours, peers: engines that compete, by name or beginning of the name.
        must, reach: the ratio that has to be reached, and the one to aim at.
    """

    figure: str
    ours: str = OURS
    peers: Sequence[str] = ()
    must: float
    reach: float

    def compare(self, figures: Mapping[str, Figures]) -> tuple[str, str, float] | None:
        """(our best engine, the best peer, ratio); None where one side has no such figure."""
        names = [name for name in figures if self.figure in figures[name]]
        ours = [name for name in names if name.startswith(self.ours)]
        peers = [
            name
            for name in names
            if not name.startswith(OURS) and (not self.peers or name.startswith(tuple(self.peers)))
        ]
        if not ours or not peers:
            return None
        best_of_ours = max(ours, key=lambda name: figures[name][self.figure])
        best_peer = max(peers, key=lambda name: figures[name][self.figure])
        return best_of_ours, best_peer, figures[best_of_ours][self.figure] / figures[best_peer][self.figure]


BARS = {
    "qwen2.5-0.5b": (
        Bar(figure="decode 1", ours="cluster int8", peers=("openvino int8",), must=1.2, reach=1.4),
        Bar(figure="decode 1", ours="cluster int4", peers=("openvino int4",), must=1.25, reach=1.7),
        Bar(figure="decode 8", must=1.25, reach=1.8),
        Bar(figure="decode 16", must=1.25, reach=1.8),
        Bar(figure="decode 32", must=1.25, reach=1.8),
        Bar(figure="whole run 32", must=1.3, reach=1.7),
        Bar(figure="prefill", must=1.25, reach=1.6),
        Bar(figure="decode 16", ours="cluster float32", peers=("vllm float32",), must=1.5, reach=2.0),
    ),
    "s-15m": (
        Bar(figure="decode 1", ours="cluster int8", must=1.0, reach=1.3),
        Bar(figure="decode 32", ours="cluster int8", must=1.0, reach=1.3),
    ),
}


def figures_of(rounds: Iterable[Sequence[Mapping[str, Any]]], prefill_tokens: int) -> Figures:
    """Medians over the rounds of one engine.

    Args:
        rounds: the lines that the runner reported, each with ``at_s``: seconds since its process was started.

    Returns:
        ``decode N`` and ``whole run N`` in tokens per second, as ``Timeline`` defines them; ``prefill`` in prompt
        tokens per second; ``first token`` in seconds from the start of the process; ``peak memory`` in MiB.
    """
    values: dict[str, list[float]] = {}
    for lines in rounds:
        for line in lines:
            if line["kind"] == "first token":
                values.setdefault("first token", []).append(line["at_s"])
            elif line["kind"] == "memory":
                values.setdefault("peak memory", []).append(line["peak_bytes"] / 2**20)
            else:
                timeline = Timeline(line["num_requests"], (tuple(event) for event in line["events"]))
                if line["kind"] == "prefill":
                    values.setdefault("prefill", []).append(prefill_tokens / timeline.end_s)
                else:
                    count = line["num_requests"]
                    if timeline.decode_tokens_per_s is not None:
                        values.setdefault(f"decode {count}", []).append(timeline.decode_tokens_per_s)
                    values.setdefault(f"whole run {count}", []).append(timeline.tokens_per_s)
    return {name: statistics.median(measured) for name, measured in values.items()}


def table_of(figures: Mapping[str, Figures], columns: Sequence[str]) -> list[list[str]]:
    """A row per engine; empty where it has no such figure."""
    return [
        [name, *("" if column not in row else _rounded(row[column]) for column in columns)]
        for name, row in figures.items()
    ]


def bars_of(shape: str, figures: Mapping[str, Figures]) -> list[list[str]]:
    """A row per bar that both sides have a figure for: what, ours, theirs, ratio, must, reach, verdict."""
    rows = []
    for bar in BARS.get(shape, ()):
        compared = bar.compare(figures)
        if compared is not None:
            ours, peer, ratio = compared
            verdict = "reached" if ratio >= bar.reach else "met" if ratio >= bar.must else "MISSED"
            rows.append(
                [
                    bar.figure,
                    f"{_rounded(figures[ours][bar.figure])} ({ours})",
                    f"{_rounded(figures[peer][bar.figure])} ({peer})",
                    f"{ratio:.2f}x",
                    f"{bar.must:g}x",
                    f"{bar.reach:g}x",
                    verdict,
                ]
            )
    return rows


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
