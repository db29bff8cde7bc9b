"""Groups of scripted shards, and a leader in a process of its own.

python tests/scripted_group.py lead        starts a group of two, says so, and runs steps until it is ended
python tests/scripted_group.py outside     the same, with shards that somebody else starts
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from cluster.core.step import ScheduledSequence, StepInput
from cluster.distributed.config import ParallelConfig
from cluster.worker.config import WorkerConfig
from cluster.worker.group_executor import GroupExecutor
from cluster.worker.launcher import Launcher
from cluster.worker.process_launcher import ProcessLauncher
from cluster.worker.shard_group import start_group

TESTS = Path(__file__).parent
COMMAND = (sys.executable, str(TESTS / "scripted_shard.py"))


def create_group(
    tp: int = 2,
    pp: int = 1,
    *,
    start_timeout_s: float = 60.0,
    step_timeout_s: float = 60.0,
    launcher: Launcher | None = None,
    stages: list[str] | None = None,
    checkpoint: Path = TESTS,
) -> GroupExecutor:
    group = start_group(
        checkpoint,
        WorkerConfig(device="cpu"),
        ParallelConfig(tp=tp, pp=pp, start_timeout_s=start_timeout_s, step_timeout_s=step_timeout_s),
        max_num_seqs=4,
        max_num_batched_tokens=64,
        launcher=launcher or ProcessLauncher(tp * pp, command=COMMAND),
        on_stage=(stages if stages is not None else []).append,
    )
    return GroupExecutor(group, step_timeout_s)


def create_step(step_id: int, num_seqs: int = 3) -> StepInput:
    shares = tuple(
        ScheduledSequence(
            sequence_id=sequence_id, num_computed_tokens=step_id, num_new_tokens=1, new_block_ids=(), samples=True
        )
        for sequence_id in range(num_seqs)
    )
    return StepInput(step_id=step_id, new=(), scheduled=shares, dropped=())


class OutsideLauncher:
    """Leaves it to whoever reads standard output to start the shards, as Ray would."""

    host = None

    def launch(self, rank: int, address: str, secret: str) -> None:
        print(rank, address, secret, flush=True)

    def ended(self, rank: int) -> str | None:
        return None

    def stop(self) -> None:
        return


def lead(launcher: Launcher | None) -> None:
    executor = create_group(launcher=launcher)
    print("ready", *(member.hello.pid for member in executor._members), flush=True)
    for step_id in range(10**9):
        executor.submit(create_step(step_id))
        executor.collect()
        time.sleep(0.01)


if __name__ == "__main__":
    print(os.getpid(), flush=True)
    lead(OutsideLauncher() if sys.argv[1] == "outside" else None)
