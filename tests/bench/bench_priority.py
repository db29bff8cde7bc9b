"""Classes under overload, with a real engine: what P0 sees while P3 floods, what each class gets, what fails.

A replica, a gateway and this client as plain processes. The capacity is measured first, closed loop; every scenario
then has a gateway of its own, so that none begins with another's queue.

    python tests/bench/bench_priority.py --model demo --prompt 512 --new 32
    python tests/bench/bench_priority.py --shape qwen2.5-0.5b --worker '{"weights": "int8"}' --prompt 512 --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
from collections.abc import Mapping
from typing import Any

from plain_process import PlainProcess, gateway, wait_serving
from stamp import report

from cluster.bench.serve.arrivals import Closed, Rate
from cluster.bench.serve.figures import Targets
from cluster.bench.serve.grpc_target import GrpcTarget
from cluster.bench.serve.load import Classes, DrawnLoad, Lengths
from cluster.bench.serve.load_run import Limits, run_loads
from cluster.bench.serve.report import Report, make_report
from cluster.bench.serve.target import Target
from cluster.client.credentials import Credentials
from cluster.core.request import Priority

_REFUSALS = ("RESOURCE_EXHAUSTED", "CUT OFF")
_RATED_LOAD = 0.7
_RATED_CLASSES = {Priority.P0: 0.1, Priority.P1: 0.4, Priority.P2: 0.4, Priority.P3: 0.1}


class Scenarios:
    """Loads on one replica.

    Args:
        new: tokens of each completion.
        seconds: that each scenario is measured for, after ``warm_up_s``.
    """

    def __init__(
        self, replica: PlainProcess, arguments: list[str], *, prompt: int, new: int, seconds: float, warm_up_s: float
    ) -> None:
        self._replica = replica
        self._arguments = arguments
        self._lengths = {"prompt": Lengths(low=prompt, high=prompt), "new": Lengths(low=new, high=new)}
        self._limits = Limits(duration_s=seconds + warm_up_s, warm_up_s=warm_up_s, grace_s=5.0, deadline_s=300.0)

    def capacity(self, concurrency: int) -> float:
        """Requests a second with so many always under way."""
        load = DrawnLoad(arrivals=Closed(concurrency=concurrency), classes=_only(Priority.P1), **self._lengths)
        return float(self._run([load])["total"]["requests_per_s"])

    def run(self, rates: Mapping[Priority, float]) -> Report:
        """Each class at its rate of requests a second."""
        return self._run(
            [
                DrawnLoad(arrivals=Rate(per_s=rate), classes=_only(priority), **self._lengths)
                for priority, rate in rates.items()
            ]
        )

    def _run(self, loads: list[DrawnLoad]) -> Report:
        with gateway([self._replica], *self._arguments) as front:
            recording = asyncio.run(_run(front.address, loads, self._limits))
        return make_report(recording, self._limits, Targets(), {})


async def _run(address: str, loads: list[DrawnLoad], limits: Limits) -> Any:
    target: Target = GrpcTarget([address], "", Credentials())
    try:
        await wait_serving(address)
        return await run_loads(target, loads, limits, seed=1)
    finally:
        await target.close()


@functools.cache
def _only(priority: Priority) -> Classes:
    return Classes(weights={priority: 1.0})


def summary(run: Report) -> dict[str, Any]:
    """What the bars are about."""
    errors = {
        status: count
        for status, count in run["total"]["statuses"].items()
        if status != "OK" and not status.startswith(_REFUSALS)
    }
    return {
        "tokens_per_s": run["total"]["tokens_per_s"],
        "errors": errors,
        "refused_ms": run["total"]["failed_ms"],
        "classes": {
            name: {
                "share": figures["token_share"],
                "requests": figures["num_requests"],
                "ttft_ms": figures["ttft_ms"],
                "e2e_ms": figures["e2e_ms"],
                "statuses": figures["statuses"],
            }
            for name, figures in run["classes"].items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as for 'cluster serve'")
    parser.add_argument("--shape", help="random weights in a shape by name")
    parser.add_argument("--worker", default="{}", help="the model's section worker, as JSON")
    parser.add_argument("--engine", default="{}", help="the model's section engine, as JSON")
    parser.add_argument("--classes", default="{}", help="the section classes, as JSON")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=64, help="that the capacity is measured with")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--warm-up-s", type=float, default=5.0)
    arguments = parser.parse_args()
    model = ["--model", arguments.model] if arguments.shape is None else ["--shape", arguments.shape]
    classes = ["--classes", arguments.classes]
    with PlainProcess(
        "plain_replica.py", *model, "--worker", arguments.worker, "--engine", arguments.engine, *classes
    ) as replica:
        scenarios = Scenarios(
            replica,
            classes,
            prompt=arguments.prompt,
            new=arguments.new,
            seconds=arguments.seconds,
            warm_up_s=arguments.warm_up_s,
        )
        capacity = scenarios.capacity(arguments.concurrency)
        p0, p3 = Priority.P0, Priority.P3
        alone = scenarios.run({p0: 0.1 * capacity})
        flood = scenarios.run({p3: 3 * capacity})
        flooded = scenarios.run({p0: 0.1 * capacity, p3: 3 * capacity})
        all_classes = scenarios.run(dict.fromkeys(Priority, 1.5 * capacity))
        p0_saturates = scenarios.run({p0: 2 * capacity, p3: 2 * capacity})
        overload = scenarios.run({priority: 1.5 * capacity * share for priority, share in _RATED_CLASSES.items()})
        rated = scenarios.run({priority: _RATED_LOAD * capacity * share for priority, share in _RATED_CLASSES.items()})
    ttft_alone, ttft_flooded = (run["classes"]["P0"]["ttft_ms"]["p99"] for run in (alone, flooded))
    report(
        {
            "settings": {
                "model": arguments.model or arguments.shape,
                "prompt": arguments.prompt,
                "new": arguments.new,
                "worker": json.loads(arguments.worker),
                "engine": json.loads(arguments.engine),
            },
            "capacity_requests_per_s": capacity,
            "p0_ttft_p99_ms": {"alone": ttft_alone, "flooded": ttft_flooded},
            "p0_ttft_ratio": round(ttft_flooded / ttft_alone, 3),
            "throughput_kept": round(flooded["total"]["tokens_per_s"] / flood["total"]["tokens_per_s"], 3),
            "shares_at_saturation": {name: each["token_share"] for name, each in all_classes["classes"].items()},
            "p3_share_under_p0": p0_saturates["classes"]["P3"]["token_share"],
            "runs": {
                "p0 alone": summary(alone),
                "p3 at 3x": summary(flood),
                "p0 under p3 at 3x": summary(flooded),
                "all classes at 1.5x each": summary(all_classes),
                "p0 and p3 at 2x each": summary(p0_saturates),
                "1.5x in all": summary(overload),
                f"{_RATED_LOAD}x in all": summary(rated),
            },
        }
    )


if __name__ == "__main__":
    main()
