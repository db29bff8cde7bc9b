"""A report as one HTML file that needs no other: tables and plots, alone or beside an earlier run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from cluster.bench.serve.comparison import Change, compare, differences
from cluster.bench.serve.figures import MEASURES
from cluster.bench.serve.report import Report
from cluster.bench.serve.svg import Line, plot

_COLORS = {"P0": "#d1495b", "P1": "#2e7dc0", "P2": "#3a9a5b", "P3": "#9a6bc2"}
_STYLE = """
:root { color-scheme: light dark }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1120px; padding: 0 1em }
table { border-collapse: collapse; margin: 0.8em 0 } th, td { padding: 2px 12px 2px 0; text-align: right }
th:first-child, td:first-child { text-align: left } tr:nth-child(even) td { background: #8881 }
svg { width: 520px; max-width: 100%; margin: 4px 8px } svg text { font-size: 11px; fill: currentColor }
svg text[fill] { fill: revert-layer } svg .title { font-size: 13px; font-weight: 600 } svg .grid { stroke: #8883 }
pre { overflow-x: auto; background: #8881; padding: 8px } .worse { color: #c0392b } .better { color: #27864b }
"""
_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per token after the first",
    "itl": "time between messages",
    "e2e": "end to end",
}
_SPREADS = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "failed_ms", "late_ms")
_MORE_IS_BETTER = ("requests_per_s", "good_per_s", "good_share", "tokens_per_s")


def make_page(report: Report, earlier: Report | None = None) -> str:
    """
    Args:
        earlier: a run to compare with; its curves are dashed.
    """
    parts = [
        f"<h1>{escape(report['model'])}</h1>",
        f"<p>{escape(_where(report))}</p>",
        _rates(report),
        _latencies(report),
        _statuses(report),
    ]
    if earlier is not None:
        parts.append(_comparison(earlier, report))
    parts.append("<h2>Distributions</h2>" + _distributions(report, earlier))
    parts.append("<h2>Over time</h2>" + _series(report, earlier))
    parts.append(f"<h2>Settings</h2><pre>{escape(json.dumps(report['settings'], indent=1))}</pre>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(report["kind"])}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _where(report: Report) -> str:
    return (
        f"{report['measured_s']:g} s measured, {report['total']['num_requests']} requests; version "
        f"{report['version']}, commit {report['commit']}; client: {report['processor']}, {report['cores']} cores"
    )


def _scopes(report: Report) -> list[tuple[str, dict]]:
    classes = list(report["classes"].items())
    return [*classes, ("all", report["total"])] if len(classes) > 1 else [("all", report["total"])]


def _rates(report: Report) -> str:
    columns = ("", "requests", "finished/s", "good/s", "good", "tokens/s", "of tokens", "cached", "moved")
    rows = [
        (
            name,
            f"{figures['num_requests']:,}",
            f"{figures['requests_per_s']:,.2f}",
            "" if figures["good_per_s"] is None else f"{figures['good_per_s']:,.2f}",
            "" if figures["good_share"] is None else f"{figures['good_share']:.1%}",
            f"{figures['tokens_per_s']:,.1f}",
            f"{figures['token_share']:.1%}",
            f"{figures['cached_tokens'] / max(1, figures['prompt_tokens']):.1%}",
            f"{figures['num_moved']:,}",
        )
        for name, figures in _scopes(report)
    ]
    return _table(columns, rows)


def _latencies(report: Report) -> str:
    rows = [
        (
            f"{name} {measure.removesuffix('_ms')}",
            *(f"{spread[key]:,.1f}" for key in ("p50", "p90", "p99", "mean", "max")),
        )
        for name, figures in _scopes(report)
        for measure in _SPREADS
        if (spread := figures[measure]) is not None
    ]
    return _table(("ms", "p50", "p90", "p99", "mean", "max"), rows)


def _statuses(report: Report) -> str:
    rows = [
        (f"{name} {status}", f"{count:,}")
        for name, figures in _scopes(report)
        for status, count in figures["statuses"].items()
    ]
    return _table(("status", "requests"), rows)


def _comparison(earlier: Report, report: Report) -> str:
    different = "".join(f"<li>{escape(line)}</li>" for line in differences(earlier, report))
    rows = [
        (f"{change.scope} {change.figure}", _number(change.before), _number(change.after), _ratio(change))
        for change in compare(earlier, report)
    ]
    table = _table(("", "earlier", "now", "ratio"), rows, raw_last=True)
    return f"<h2>Against the earlier run</h2><p>What differs:</p><ul>{different}</ul>{table}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3f}".rstrip("0").rstrip(".")


def _ratio(change: Change) -> str:
    ratio = change.ratio
    if ratio is None:
        return ""
    better = ratio > 1 if change.figure in _MORE_IS_BETTER else ratio < 1
    kind = "" if abs(ratio - 1) < 0.02 or change.figure == "token_share" else "better" if better else "worse"
    return f'<span class="{kind}">{ratio:.3f}</span>'


def _runs(report: Report, earlier: Report | None) -> list[tuple[Report, bool]]:
    return [(report, False)] if earlier is None else [(earlier, True), (report, False)]


def _distributions(report: Report, earlier: Report | None) -> str:
    plots = []
    for measure in MEASURES:
        lines = [
            Line(
                name=f"{name} earlier" if dashed else name,
                xs=range(len(values)),
                ys=values,
                color=_COLORS[name],
                dashed=dashed,
            )
            for run, dashed in _runs(report, earlier)
            for name, measures in run["distributions"].items()
            if (values := measures[measure])
        ]
        plots.append(plot(_TITLES[measure], lines, x_label="percent of requests", y_label="ms", log_y=True))
    return "".join(plots)


def _series(report: Report, earlier: Report | None) -> str:
    shown = (
        ("requests due", "due_per_s", "1/s"),
        ("requests not answered", "failed_per_s", "1/s"),
        ("tokens", "tokens_per_s", "1/s"),
        ("requests under way", "running", ""),
        ("time to first token, p50", "ttft_p50_ms", "ms"),
        ("time to first token, p99", "ttft_p99_ms", "ms"),
    )
    plots = []
    for title, key, unit in shown:
        lines = [
            Line(
                name=f"{name} earlier" if dashed else name,
                xs=series["at_s"],
                ys=series[key],
                color=_COLORS[name],
                dashed=dashed,
            )
            for run, dashed in _runs(report, earlier)
            for name, series in run["series"].items()
        ]
        plots.append(plot(title, lines, x_label="s", y_label=unit))
    return "".join(plots)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, raw_last: bool = False) -> str:
    """
    Args:
        raw_last: the last column is HTML already.
    """
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = ""
    for row in rows:
        cells = [escape(cell) for cell in row]
        if raw_last:
            cells[-1] = row[-1]
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"
