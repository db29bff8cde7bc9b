"""Two runs side by side."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.bench.serve.report import Report

_RATES = ("requests_per_s", "good_per_s", "good_share", "tokens_per_s", "token_share")
_LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "failed_ms")
_PERCENTILES = ("p50", "p90", "p99")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure in two runs.

    Attributes:
        scope: a class, or "all".
        figure: its name, such as "ttft_ms p99".
        before, after: None: that run has none.
        ratio: after over before; None where there is none.
    """

    scope: str
    figure: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        if self.before is None or self.after is None or self.before == 0:
            return None
        return self.after / self.before


def compare(before: Report, after: Report) -> list[Change]:
    """All figures that one of them has, by class; the total last."""
    names = [*sorted({*before["classes"], *after["classes"]}), "all"]
    return [change for name in names for change in _compare(name, _figures(before, name), _figures(after, name))]


def differences(before: Report, after: Report) -> list[str]:
    """What the two runs do not have in common and what their figures depend on, one line each."""
    lines = []
    for name in ("processor", "cores", "memory_gib", "commit", "model", "measured_s"):
        if before.get(name) != after.get(name):
            lines.append(f"{name}: {before.get(name)} and {after.get(name)}")
    ours, theirs = before["settings"], after["settings"]
    lines += [
        f"{name}: {ours.get(name)} and {theirs.get(name)}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    return lines


def _figures(report: Report, name: str) -> dict[str, float | None]:
    found = report["total"] if name == "all" else report["classes"].get(name)
    if found is None:
        return {}
    figures: dict[str, float | None] = {rate: found[rate] for rate in _RATES}
    figures["requests not OK"] = sum(count for status, count in found["statuses"].items() if status != "OK")
    for latency in _LATENCIES:
        for percentile in _PERCENTILES:
            spread = found[latency]
            figures[f"{latency} {percentile}"] = None if spread is None else spread[percentile]
    return figures


def _compare(scope: str, before: dict[str, float | None], after: dict[str, float | None]) -> list[Change]:
    changes = (
        Change(scope=scope, figure=figure, before=before.get(figure), after=after.get(figure))
        for figure in (before or after)
    )
    return [change for change in changes if change.before is not None or change.after is not None]
