"""A run in figures: latencies by percentile, throughput, goodput."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.sim.recording import Ending, Record, Recording


@dataclass(frozen=True, kw_only=True, slots=True)
class Percentiles:
    """Of seconds; NaN where there are none."""

    p50: float
    p90: float
    p99: float
    mean: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        ordered = sorted(values)
        if not ordered:
            return cls(p50=math.nan, p90=math.nan, p99=math.nan, mean=math.nan, max=math.nan)
        return cls(
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p99=percentile(ordered, 99),
            mean=math.fsum(ordered) / len(ordered),
            max=ordered[-1],
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """Of the requests that arrived, and of the tokens that came, from ``start_s`` to ``end_s``.

    Attributes:
        endings: how many requests ended how.
        requests_per_s, tokens_per_s: completed requests, and tokens, over that time.
        ttft_s: from a request's arrival to its first token.
        itl_s: from one token of a request to its next; all of them together.
        e2e_s: from arrival to the last token, of those that finished.
    """

    start_s: float
    end_s: float
    endings: dict[str, int]
    requests_per_s: float
    tokens_per_s: float
    ttft_s: Percentiles
    itl_s: Percentiles
    e2e_s: Percentiles

    @classmethod
    def of(cls, recording: Recording, start_s: float, end_s: float) -> Report:
        """
        Raises:
            ValueError: no time lies between the two.
        """
        if not end_s > start_s:
            raise ValueError(f"a report from {start_s} s to {end_s} s")
        records = [record for record in recording.records if start_s <= record.arrival.at_s < end_s]
        first, end = (bisect_left(recording.token_times_s, time_s) for time_s in (start_s, end_s))
        first_tokens = [r.first_token_s for r in recording.records if r.first_token_s is not None]
        num_tokens = end - first + sum(start_s <= time_s < end_s for time_s in first_tokens)
        finished = [record for record in recording.records if record.ending is Ending.FINISHED]
        return cls(
            start_s=start_s,
            end_s=end_s,
            endings=dict(Counter(record.ending.value for record in records if record.ending is not None)),
            requests_per_s=sum(start_s <= record.ended_s < end_s for record in finished) / (end_s - start_s),
            tokens_per_s=num_tokens / (end_s - start_s),
            ttft_s=Percentiles.of(
                record.first_token_s - record.arrival.at_s for record in records if record.first_token_s is not None
            ),
            itl_s=Percentiles.of(recording.token_gaps_s[first:end]),
            e2e_s=Percentiles.of(
                record.ended_s - record.arrival.at_s for record in records if record.ending is Ending.FINISHED
            ),
        )


def goodput(records: Iterable[Record], *, ttft_s: float, tpot_s: float) -> int:
    """How many requests finished, with their first token within ``ttft_s`` and the rest ``tpot_s`` apart on average."""
    return sum(
        record.ending is Ending.FINISHED
        and record.first_token_s is not None
        and record.first_token_s - record.arrival.at_s <= ttft_s
        and record.last_token_s - record.first_token_s <= tpot_s * (record.num_output_tokens - 1)
        for record in records
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The least of the values, sorted, that ``percent`` of 100 do not exceed; no value is made up between two."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
