"""What it costs to hand a step to a group of shards and have it back: processes, sockets and messages, no model.

The shards answer at once, so all that is measured lies beyond the work: encoding, two system calls and a wake-up each
way, decoding. A second figure waits also for the shards that only acknowledge. Steps decode, one token per sequence.

    python tests/bench/bench_step_channel.py --shards 2 --sequences 16 --steps 5000
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stamp import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripted_group import create_group, create_step
from scripted_shard import ScriptedShard

from cluster.core.step import SampledToken, StepInput, StepOutput
from cluster.worker.group_executor import GroupExecutor
from cluster.worker.messages import Done, Ran, Run, decode_from_shard, decode_to_shard, encode
from cluster.worker.process_launcher import ProcessLauncher
from cluster.worker.shard_main import main as shard_main

_WARM_UP = 500


class InstantShard(ScriptedShard):
    """Answers with tokens that it has ready."""

    _tokens: dict[int, SampledToken] = {}  # noqa: RUF012  # replaced, never filled

    def launch(self, step: StepInput) -> Callable[[], StepOutput]:
        if len(step.scheduled) != len(self._tokens):
            self._tokens = {share.sequence_id: SampledToken(token_id=share.sequence_id) for share in step.scheduled}
        return lambda: StepOutput(step_id=step.step_id, sampled=self._tokens)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """In microseconds."""
    ordered = sorted(seconds)
    return {
        name: round(1e6 * ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))], 1)
        for name, share in (("p5", 0.05), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }


def round_trips(executor: GroupExecutor, num_steps: int, num_sequences: int, pause_s: float) -> dict[str, float]:
    """From the step as the engine has it to its output, as the engine gets it."""
    seconds = []
    for step_id in range(num_steps + _WARM_UP):
        step = create_step(step_id, num_sequences)
        began = time.perf_counter()
        executor.submit(step)
        executor.collect()
        seconds.append(time.perf_counter() - began)
        if pause_s:
            time.sleep(pause_s)
    return percentiles(seconds[_WARM_UP:])


def full_round_trips(executor: GroupExecutor, first: int, num_steps: int, num_sequences: int) -> dict[str, float]:
    """The same, until every shard has said that it is done."""
    seconds = []
    for step_id in range(first, first + num_steps):
        step = create_step(step_id, num_sequences)
        began = time.perf_counter()
        executor.submit(step)
        executor.collect()
        for member in executor._others:
            while member.done_step < step_id:
                member.done_step = decode_from_shard(member.work.receive(10.0)).step_id
        seconds.append(time.perf_counter() - began)
    return percentiles(seconds)


def coding(num_sequences: int) -> dict[str, float]:
    """Of one step there and back, in microseconds: what the messages alone take, in one process."""
    run = Run(step=create_step(1, num_sequences))
    ran = Ran(output=StepOutput(step_id=1, sampled={row: SampledToken(token_id=row) for row in range(num_sequences)}))
    step_frame, output_frame, done_frame = encode(run), encode(ran), encode(Done(step_id=1))
    return {
        "encode_step_us": best(lambda: encode(run)),
        "decode_step_us": best(lambda: decode_to_shard(step_frame)),
        "encode_output_us": best(lambda: encode(ran)),
        "decode_output_us": best(lambda: decode_from_shard(output_frame)),
        "decode_acknowledgement_us": best(lambda: decode_from_shard(done_frame)),
        "step_bytes": len(step_frame),
        "output_bytes": len(output_frame),
    }


def best(run: Callable[[], object], repeats: int = 200) -> float:
    times = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        times.append((time.perf_counter() - began) / repeats)
    return round(1e6 * min(times), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--pause-ms", type=float, default=0.0, help="between steps; processes that slept wake slower")
    arguments = parser.parse_args()
    command = (sys.executable, str(Path(__file__).resolve()))
    executor = create_group(arguments.shards, launcher=ProcessLauncher(arguments.shards, command=command))
    try:
        answered = round_trips(executor, arguments.steps, arguments.sequences, arguments.pause_ms / 1e3)
        first = arguments.steps + _WARM_UP
        acknowledged = full_round_trips(executor, first, arguments.steps, arguments.sequences)
    finally:
        executor.shutdown()
    report(
        {
            "settings": vars(arguments),
            "round_trip_us": answered,
            "round_trip_of_all_shards_us": acknowledged,
            "coding": coding(arguments.sequences),
        }
    )


if __name__ == "__main__":
    if "--rank" in sys.argv:
        shard_main(InstantShard)
    else:
        main()
