"""``cluster bench capacity``: how much load chunked prefill carries against prefill first, simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.bench.stamp import stamp
from cluster.cli.options import Json
from cluster.cli.output import print_json, print_table, print_text
from cluster.sim.capacity import Comparison, compare
from cluster.sim.latency import StepTimes, read_profile
from cluster.sim.workload import Lengths, read_azure


def capacity(
    profile: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="From cluster bench profile.")],
    trace: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="An Azure LLM inference trace, CSV.")],
    batch: Annotated[int, typer.Option(min=2, help="Sequences in the largest batch.")] = 32,
    requests: Annotated[int, typer.Option(min=100, help="Requests of each run.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same requests.")] = 0,
    json: Json = False,
) -> None:
    """The highest rate of requests at which the gaps between tokens stay short, by policy.

    Requests have the trace's lengths and arrive at random. A rate is carried when every request finishes, 99 % of all
    gaps between tokens last at most twice a step of half the largest batch that only decodes, and the median time to
    the first token is at most that of ten mean prompts.
    """
    step_times = StepTimes.from_profile(read_profile(profile))
    lengths = [
        Lengths(num_prompt_tokens=arrival.num_prompt_tokens, num_output_tokens=arrival.num_output_tokens)
        for arrival in read_azure(trace)
    ]
    comparison = compare(step_times, lengths, max_num_seqs=batch, num_requests=requests, seed=seed)
    if json:
        print_json(
            stamp()
            | {"profile": str(profile), "trace": str(trace), "batch": batch, "requests": requests, "seed": seed}
            | {"ratio": comparison.ratio, "comparison": comparison}
        )
    else:
        _print(comparison)


def _print(comparison: Comparison) -> None:
    rows = {
        "prefill first": comparison.prefill_first,
        "chunked": comparison.chunked,
        "chunked, any gap": comparison.unbounded,
    }
    print_table(
        ["policy", "requests/s", "gap p99 ms", "first token p50 s", "tok/s"],
        [
            [
                name,
                f"{found.rate:.3f}",
                f"{1e3 * found.report.itl_s.p99:.0f}",
                f"{found.report.ttft_s.p50:.2f}",
                f"{found.report.tokens_per_s:,.1f}",
            ]
            for name, found in rows.items()
        ],
    )
    terms = comparison.terms
    print_text(
        f"\nchunked carries {comparison.ratio:.2f} times as much; terms: gap p99 {1e3 * terms.itl_p99_s:.0f} ms, "
        f"first token p50 {terms.ttft_p50_s:.1f} s\n"
    )
