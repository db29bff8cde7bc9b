"""A run in figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from cluster.bench.serve.record import CUT_OFF, OK, Record
from cluster.core.request import Priority
from cluster.errors import require
from cluster.sim.report import percentile

MEASURES = ("ttft", "tpot", "itl", "e2e")
_NUM_QUANTILES = 101


@dataclass(frozen=True, kw_only=True)
class Milliseconds:
    """How a latency is spread."""

    p50: float
    p90: float
    p99: float
    mean: float
    max: float

    @classmethod
    def of(cls, values_s: Iterable[float]) -> Milliseconds | None:
        """Of values in seconds; None where there are none."""
        ordered = sorted(values_s)
        if not ordered:
            return None
        p50, p90, p99 = (round(1e3 * percentile(ordered, percent), 3) for percent in (50, 90, 99))
        mean, highest = round(1e3 * math.fsum(ordered) / len(ordered), 3), round(1e3 * ordered[-1], 3)
        return cls(p50=p50, p90=p90, p99=p99, mean=mean, max=highest)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a request must keep to be good, in ms by measure: ttft, tpot, e2e.

    Attributes:
        common: of every class.
        by_class: instead of these, of one class.
    """

    common: dict[str, float] = field(default_factory=dict)
    by_class: dict[Priority, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for limits in (self.common, *self.by_class.values()):
            for measure in limits:
                require(measure in ("ttft", "tpot", "e2e"), measure, "is no target: give ttft, tpot or e2e")

    def __bool__(self) -> bool:
        return bool(self.common or self.by_class)

    def kept(self, record: Record) -> bool:
        limits = self.common | self.by_class.get(record.priority, {})
        values = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2e": record.e2e_s}
        # A completion of one token has no time per token, and so keeps it.
        return record.ok and all(
            (value := values[measure]) is None or value * 1e3 <= limit for measure, limit in limits.items()
        )


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of requests that were due, and of tokens that came, while it was measured.

    Attributes:
        statuses: how many requests ended how.
        requests_per_s: finished.
        good_per_s, good_share: requests a second that finished and kept the targets, and their share of all that were
            due; None without targets.
        prompt_tokens, cached_tokens: of finished requests.
        tokens_per_s: of completions, as they came, whatever became of their requests.
        token_share: of the completions' tokens of all classes.
        ttft_ms, tpot_ms, itl_ms, e2e_ms: to the first token; per token after it, by request; between messages; to the
            end, of finished requests.
        failed_ms: until a request without an answer had failed, refusals above all.
        late_ms: how much later than due the client itself sent.
        num_moved: requests that went on at another replica.
    """

    num_requests: int
    statuses: dict[str, int]
    requests_per_s: float
    good_per_s: float | None
    good_share: float | None
    prompt_tokens: int
    cached_tokens: int
    tokens_per_s: float
    token_share: float
    ttft_ms: Milliseconds | None
    tpot_ms: Milliseconds | None
    itl_ms: Milliseconds | None
    e2e_ms: Milliseconds | None
    failed_ms: Milliseconds | None
    late_ms: Milliseconds | None
    num_moved: int


@dataclass(frozen=True, kw_only=True)
class Window:
    """What is measured, in seconds from the start of the run."""

    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        require(self.end_s > self.start_s, "end_s", "nothing was sent after the warm-up")

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s

    def __contains__(self, at_s: float) -> bool:
        return self.start_s <= at_s < self.end_s


def figures_of(records: Sequence[Record], window: Window, targets: Targets, *, all_tokens: float) -> Figures:
    """
    Args:
        all_tokens: that came in the window, of all classes.
    """
    due = [record for record in records if record.due_s in window]
    finished = [record for record in due if record.ok]
    good = sum(targets.kept(record) for record in due) if targets else None
    tokens = tokens_in(records, window)
    return Figures(
        num_requests=len(due),
        statuses=dict(Counter(record.status for record in due).most_common()),
        requests_per_s=_rate(sum(record.ok and record.ended_s in window for record in records), window),
        good_per_s=None if good is None else _rate(good, window),
        good_share=None if good is None else round(good / max(1, len(due)), 4),
        prompt_tokens=sum(record.num_prompt_tokens for record in finished),
        cached_tokens=sum(record.cached_tokens for record in finished),
        tokens_per_s=_rate(tokens, window),
        token_share=round(tokens / all_tokens, 4) if all_tokens else 0.0,
        **{f"{measure}_ms": Milliseconds.of(values_s(due, measure)) for measure in MEASURES},
        failed_ms=Milliseconds.of(
            record.ended_s - record.sent_s
            for record in due
            if record.status not in (OK, CUT_OFF) and not record.times_s
        ),
        late_ms=Milliseconds.of(record.sent_s - record.due_s for record in due),
        num_moved=sum(record.num_moves > 0 for record in due),
    )


def values_s(records: Iterable[Record], measure: str) -> list[float]:
    """A measure's values of the records that have it, in seconds."""
    if measure == "itl":
        return [after - before for record in records for before, after in pairwise(record.times_s)]
    if measure == "ttft":
        values = [record.ttft_s for record in records]
    elif measure == "tpot":
        values = [record.tpot_s for record in records if record.ok]
    else:
        values = [record.e2e_s for record in records if record.ok]
    return [value for value in values if value is not None]


def tokens_in(records: Iterable[Record], window: Window) -> float:
    """Tokens of completions that came in the window; where messages do not tell, in proportion."""
    total = 0.0
    for record in records:
        counted = sum(record.counts)
        if not counted:
            continue
        there = sum(count for time_s, count in zip(record.times_s, record.counts, strict=True) if time_s in window)
        total += there * record.num_new_tokens / counted
    return total


def quantiles_ms(values: Sequence[float]) -> list[float]:
    """The distribution of values in seconds, at 0 to 100 percent, in ms; empty where there are none."""
    if not values:
        return []
    return np.round(1e3 * np.quantile(values, np.linspace(0, 1, _NUM_QUANTILES)), 3).tolist()


def _rate(count: float, window: Window) -> float:
    return round(count / window.length_s, 3)
