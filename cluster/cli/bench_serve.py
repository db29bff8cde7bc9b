"""``cluster bench serve``: load on a running server, and what its requests saw of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cluster.bench.serve.arrivals import Closed, Ramp, Rate
from cluster.bench.serve.comparison import compare, differences
from cluster.bench.serve.figures import Milliseconds, Targets
from cluster.bench.serve.grpc_target import GrpcTarget
from cluster.bench.serve.load import Classes, DrawnLoad, Lengths, Load, TraceLoad
from cluster.bench.serve.load_run import Limits, Recording, run_loads
from cluster.bench.serve.openai_target import OpenAITarget
from cluster.bench.serve.page import make_page
from cluster.bench.serve.report import Report, make_report, read_report, write_page, write_report
from cluster.bench.serve.target import Target
from cluster.cli.connection import Connection, connects
from cluster.cli.options import Json, Model
from cluster.cli.output import print_json, print_table, print_text
from cluster.client.addresses import parse_addresses
from cluster.core.request import Priority
from cluster.errors import ConfigError


@connects
def serve(
    connection: Connection,
    model: Model = "",
    openai: Annotated[
        str | None, typer.Option(metavar="URL", help="Use OpenAI's API over HTTP there, and no gRPC.")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="Requests a second, open loop: Poisson.")] = None,
    variation: Annotated[
        float, typer.Option(min=0, help="Of the gaps between requests: 0 even, 1 Poisson, above 1 bursts (gamma).")
    ] = 1.0,
    ramp_to: Annotated[
        float | None, typer.Option(min=0, help="The rate changes to this one over the duration.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Closed loop: requests under way at a time.")] = None,
    trace: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Azure (.csv) or Mooncake (.jsonl); at its times.")
    ] = None,
    speed: Annotated[float, typer.Option(help="How much faster than the trace.")] = 1.0,
    scale: Annotated[float, typer.Option(help="Of all lengths in the trace.")] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Leave longer requests of the trace out.")] = None,
    prompt: Annotated[str, typer.Option(metavar="N[-M]", help="Tokens of each prompt, after its prefix.")] = "128",
    new: Annotated[str, typer.Option(metavar="N[-M]", help="Tokens of each completion.")] = "64",
    prefixes: Annotated[int, typer.Option(min=1, help="How many prefixes prompts share.")] = 1,
    prefix: Annotated[int, typer.Option(min=0, help="Tokens of each shared prefix.")] = 0,
    classes: Annotated[str, typer.Option(metavar="P0:W,...", help="The mix of classes, by weight.")] = "P1:1",
    requests: Annotated[int | None, typer.Option(min=1, help="Send so many.", show_default="no bound")] = None,
    duration: Annotated[float | None, typer.Option(min=0, help="Send for so many seconds.", show_default="60")] = None,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds at the start that do not count.")] = 0.0,
    goodput: Annotated[
        str,
        typer.Option(metavar="ttft:MS,...", help="Targets: ttft, tpot, e2e; P0.ttft:MS for one class alone."),
    ] = "",
    deadline: Annotated[float, typer.Option(min=0, help="Seconds that each request may take.")] = 600.0,
    grace: Annotated[
        float | None,
        typer.Option(min=0, help="After the duration, cut off what runs then.", show_default="wait for it"),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests.")] = 0,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Token ids of prompts are below it.", show_default="the model's, or 1000")
    ] = None,
    save: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the report there, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Write it there as one page with plots.")] = None,
    against: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Compare with an earlier report (JSON).")
    ] = None,
    json: Json = False,
) -> None:
    """Load on a running server: time to first token, per token and to the end, goodput, errors by status.

    One of --rate, --concurrency and --trace says when requests are sent. In an open loop latencies count from when a
    request was due, however late this client was. Nothing is tried again.
    """
    earlier = None if against is None else read_report(against)
    limits = Limits(
        duration_s=60.0 if duration is None and requests is None and trace is None else duration,
        num_requests=requests,
        warm_up_s=warm_up,
        deadline_s=deadline,
        grace_s=grace,
    )
    mix = _classes(classes)
    if sum(way is not None for way in (rate, concurrency, trace)) != 1 and not (trace and concurrency and not rate):
        raise typer.BadParameter("give one of --rate, --concurrency and --trace; --concurrency goes with --trace, too")
    load: Load
    if trace is not None:
        load = TraceLoad(
            path=trace, speed=speed, scale=scale, max_tokens=max_tokens, classes=mix, concurrency=concurrency
        )
    else:
        load = DrawnLoad(
            arrivals=_arrivals(rate, variation, ramp_to, concurrency, limits),
            prompt=_lengths(prompt, "--prompt"),
            new=_lengths(new, "--new"),
            classes=mix,
            num_prefixes=prefixes,
            prefix_tokens=prefix,
        )
    targets = _targets(goodput)
    recording = asyncio.run(_run(connection, openai, model, load, limits, seed, vocab_size))
    settings = {"address": openai or connection.address, "load": _plain(load), "limits": _plain(limits), "seed": seed}
    report = make_report(recording, limits, targets, settings)
    if save is not None:
        write_report(report, save)
    if html is not None:
        write_page(make_page(report, earlier), html)
    if json:
        print_json(report)
        return
    _print_report(report)
    if earlier is not None:
        print_text("\n")
        _print_comparison(earlier, report)


def compare_reports(
    before: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A report of bench serve --save.")],
    after: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A later one.")],
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Write both there as one page with plots.")] = None,
    json: Json = False,
) -> None:
    """Two reports of bench serve side by side, and what else differs between the runs."""
    earlier, report = read_report(before), read_report(after)
    if html is not None:
        write_page(make_page(report, earlier), html)
    if json:
        changes = [
            {"scope": one.scope, "figure": one.figure, "before": one.before, "after": one.after, "ratio": one.ratio}
            for one in compare(earlier, report)
        ]
        print_json({"differences": differences(earlier, report), "changes": changes})
    else:
        _print_comparison(earlier, report)


# -- the run --------------------------------------------------------------------------------------------------------


async def _run(
    connection: Connection,
    openai: str | None,
    model: str,
    load: Load,
    limits: Limits,
    seed: int,
    vocab_size: int | None,
) -> Recording:
    target: Target
    if openai is None:
        target = GrpcTarget(parse_addresses(connection.address), model, connection.credentials())
    else:
        target = OpenAITarget(openai, model, connection.credentials())
    watch: asyncio.Task[None] | None = None

    def begin(recording: Recording) -> None:
        nonlocal watch
        watch = asyncio.create_task(_show_progress(recording))

    try:
        return await run_loads(target, [load], limits, seed=seed, vocab_size=vocab_size, on_start=begin)
    except* Exception as failures:  # of a task group: what stopped the others
        raise failures.exceptions[0] from None
    finally:
        if watch is not None:
            watch.cancel()
            await asyncio.wait([watch])
        await target.close()


async def _show_progress(recording: Recording) -> None:
    """A line on standard error that changes every second; where that is no terminal, a line from time to time."""
    console = Console(stderr=True, highlight=False)
    seen_s = seen_tokens = 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            await asyncio.sleep(1.0 if console.is_terminal else 10.0)
            now_s, records = recording.now_s(), recording.records
            num_tokens = sum(len(record.times_s) for record in records)
            failed = sum(bool(record.status) and not record.ok for record in records)
            first = Milliseconds.of(
                record.ttft_s for record in records if record.times_s and record.times_s[0] >= now_s - 10
            )
            latency = "" if first is None else f", first token p50 {first.p50:,.0f} p99 {first.p99:,.0f} ms"
            line = (
                f"{now_s:,.0f} s: {len(records):,} sent, {recording.num_running:,} under way, {failed:,} not "
                f"answered, {(num_tokens - seen_tokens) / (now_s - seen_s):,.0f} messages/s{latency}"
            )
            seen_s, seen_tokens = now_s, num_tokens
            if console.is_terminal:
                live.update(Text(line), refresh=True)
            else:
                console.print(line, soft_wrap=True)


# -- options --------------------------------------------------------------------------------------------------------


def _arrivals(
    rate: float | None, variation: float, ramp_to: float | None, concurrency: int | None, limits: Limits
) -> Rate | Ramp | Closed:
    if concurrency is not None:
        return Closed(concurrency=concurrency)
    if ramp_to is None:
        return Rate(per_s=rate or 0.0, variation=variation)
    if limits.duration_s is None:
        raise typer.BadParameter("a ramp needs --duration", param_hint="--ramp-to")
    return Ramp(first_per_s=rate or 0.0, last_per_s=ramp_to, duration_s=limits.duration_s)


def _lengths(text: str, option: str) -> Lengths:
    low, _, high = text.partition("-")
    try:
        return Lengths(low=int(low), high=int(high or low))
    except (ValueError, ConfigError):
        raise typer.BadParameter(f"{text!r} is no number of tokens, such as 128 or 64-256", param_hint=option) from None


def _classes(text: str) -> Classes:
    weights = {}
    try:
        for part in text.split(","):
            name, _, weight = part.partition(":")
            weights[Priority[name.strip()]] = float(weight or 1)
        return Classes(weights=weights)
    except (KeyError, ValueError, ConfigError):
        raise typer.BadParameter(f"{text!r} is no mix, such as P0:1,P3:9", param_hint="--classes") from None


def _targets(text: str) -> Targets:
    common: dict[str, float] = {}
    by_class: dict[Priority, dict[str, float]] = {}
    try:
        for part in filter(None, text.split(",")):
            name, _, limit = part.partition(":")
            of_class, _, measure = name.strip().rpartition(".")
            limits = by_class.setdefault(Priority[of_class], {}) if of_class else common
            limits[measure] = float(limit)
        return Targets(common=common, by_class=by_class)
    except (KeyError, ValueError, ConfigError):
        raise typer.BadParameter(
            f"{text!r} holds no targets, such as ttft:500,P0.ttft:200", param_hint="--goodput"
        ) from None


def _plain(value: Any) -> Any:
    """What a load or limit is made of, for the report."""
    if isinstance(value, Classes):
        return {priority.name: weight for priority, weight in value.weights.items()}
    if isinstance(value, Lengths):
        return [value.low, value.high]
    if isinstance(value, Path):
        return value.name
    if hasattr(value, "__dataclass_fields__"):
        fields = {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
        return {"kind": type(value).__name__, **fields}
    return value


# -- what is printed ------------------------------------------------------------------------------------------------


def _print_report(report: Report) -> None:
    scopes = [*report["classes"].items(), ("all", report["total"])]
    scopes = scopes if len(scopes) > 2 else scopes[-1:]
    print_table(
        ["", "requests", "finished/s", "good", "tok/s", "of tokens", "cached", "sent late p99 ms"],
        [
            [
                name,
                f"{figures['num_requests']:,}",
                f"{figures['requests_per_s']:,.2f}",
                "" if figures["good_share"] is None else f"{figures['good_share']:.1%}",
                f"{figures['tokens_per_s']:,.1f}",
                f"{figures['token_share']:.1%}",
                f"{figures['cached_tokens'] / max(1, figures['prompt_tokens']):.1%}",
                _percentile(figures["late_ms"], "p99"),
            ]
            for name, figures in scopes
        ],
    )
    print_text("\n")
    print_table(
        ["ms", "p50", "p90", "p99", "max"],
        [
            [f"{name} {label}", *(_percentile(figures[measure], key) for key in ("p50", "p90", "p99", "max"))]
            for name, figures in scopes
            for label, measure in (
                ("first token", "ttft_ms"),
                ("per token", "tpot_ms"),
                ("between messages", "itl_ms"),
                ("end to end", "e2e_ms"),
                ("until refused", "failed_ms"),
            )
            if figures[measure] is not None
        ],
    )
    print_text("\n")
    for status, count in report["total"]["statuses"].items():
        print_text(f"{status}: {count:,}\n")


def _percentile(spread: dict[str, float] | None, key: str) -> str:
    return "" if spread is None else f"{spread[key]:,.1f}"


def _print_comparison(earlier: Report, report: Report) -> None:
    for line in differences(earlier, report):
        print_text(f"differs: {line}\n")
    print_table(
        ["", "earlier", "now", "ratio"],
        [
            [
                f"{change.scope} {change.figure}",
                "" if change.before is None else f"{change.before:,.3f}",
                "" if change.after is None else f"{change.after:,.3f}",
                "" if change.ratio is None else f"{change.ratio:.3f}",
            ]
            for change in compare(earlier, report)
        ],
    )
