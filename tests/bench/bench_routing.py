"""Routing policies in simulation: a trace of conversations, saturated and at a part of prefix_affinity's saturation.

The trace is Mooncake's (kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from stamp import report

from cluster.core.routing_config import PolicyName
from cluster.sim.routing_study import RoutingOutcome, hit_ceiling, replay_trace
from cluster.sim.workload import MOONCAKE_BLOCK_TOKENS, read_mooncake


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, help="only so many, from the first one on")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--load", type=float, default=0.8, help="share of prefix_affinity's saturated throughput")
    parser.add_argument("--policies", nargs="+", choices=get_args(PolicyName), default=["round_robin", "least_tokens"])
    arguments = parser.parse_args()
    arrivals = read_mooncake(arguments.trace, MOONCAKE_BLOCK_TOKENS)[: arguments.requests]
    ceiling = hit_ceiling(arrivals)

    def measure(policy: PolicyName, rate: float | None) -> RoutingOutcome:
        return replay_trace(arrivals, policy, rate=rate, num_replicas=arguments.replicas)

    saturated = {policy: measure(policy, None) for policy in ("prefix_affinity", *arguments.policies)}
    rate = arguments.load * saturated["prefix_affinity"].requests_per_s
    loaded = {policy: measure(policy, rate) for policy in saturated}
    affinity_saturated, affinity = saturated["prefix_affinity"], loaded["prefix_affinity"]
    figures: dict[str, Any] = {
        policy: {
            "saturated": figures_of(saturated[policy], ceiling),
            "loaded": figures_of(loaded[policy], ceiling) | {"ttft_s": seconds_of(loaded[policy])},
            "affinity_ttft_p99_better": round(loaded[policy].ttft_s.p99 / affinity.ttft_s.p99, 2),
            "affinity_throughput_over": round(affinity_saturated.requests_per_s / saturated[policy].requests_per_s, 3),
        }
        for policy in saturated
    }
    report(
        {
            "requests": len(arrivals),
            "replicas": arguments.replicas,
            "rate": round(rate, 3),
            "hit_ceiling": round(ceiling, 4),
            "policies": figures,
        }
    )


def figures_of(outcome: RoutingOutcome, ceiling: float) -> dict[str, Any]:
    return {
        "requests_per_s": round(outcome.requests_per_s, 3),
        "hit_rate": round(outcome.hit_rate, 4),
        "of_ceiling": round(outcome.hit_rate / ceiling, 3),
    }


def seconds_of(outcome: RoutingOutcome) -> dict[str, float]:
    return {name: round(value, 2) for name, value in asdict(outcome.ttft_s).items()}


if __name__ == "__main__":
    main()
