"""A shard without a model, as a process: it answers steps at once, but for what its script says.

The script is JSON in the environment's SHARD_SCRIPT: ``{"1": {"load": ["sleep", 60]}}`` has rank 1 sleep when it is
told to load. Moments are connect, join, load, allocate, step; actions are sleep (seconds), fail (class of
``cluster.errors`` and message), exit (status), sum (over the stage's ranks; only this one needs torch).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import cluster.errors
from cluster.core.layer_split import StageTimes
from cluster.core.model_info import ModelInfo
from cluster.core.step import SampledToken, StepInput, StepOutput
from cluster.worker.messages import Join
from cluster.worker.shard_main import main

NUM_BLOCKS = 100


def actions(rank: int) -> dict[str, list[Any]]:
    return json.loads(os.environ.get("SHARD_SCRIPT", "{}")).get(str(rank), {})


class ScriptedShard:
    def __init__(self, join: Join, connect_ranks: Callable[[], Any]) -> None:
        self._layout = join.layout
        self._script = actions(join.layout.rank)
        self._tp = None
        if ["sum"] in self._script.values():
            self._tp = connect_ranks().tp
        self._layers: tuple[int, int] | None = None
        self.max_in_flight = 1
        self.runner: ScriptedShard | None = None
        self._act("join")

    def _act(self, moment: str) -> None:
        match self._script.get(moment):
            case ["sleep", seconds]:
                time.sleep(seconds)
            case ["fail", error, message]:
                raise getattr(cluster.errors, error)(message)
            case ["exit", status]:
                print(f"rank {self._layout.rank} is about to exit", file=sys.stderr, flush=True)
                os._exit(status)
            case ["sum"]:
                import torch

                self._tp.all_reduce_(torch.ones(4))

    def measure(self) -> StageTimes:
        return StageTimes(layer_s=1.0, head_s=3.0)

    def load(self, layers: tuple[int, int] | None = None) -> int:
        self._act("load")
        self._layers = layers
        return NUM_BLOCKS + self._layout.rank

    def allocate(self, num_blocks: int) -> ModelInfo:
        self._act("allocate")
        self.runner = self
        return ModelInfo(
            architecture=f"layers {self._layers}",
            max_model_len=1000,
            vocab_size=1000,
            eos_token_ids=(),
            dtype="none",
            device="none",
            num_blocks=num_blocks,
            block_size=16,
            backend="none",
            tp_size=self._layout.tp_size,
            pp_size=self._layout.pp_size,
        )

    def launch(self, step: StepInput) -> Callable[[], StepOutput]:
        def collect() -> StepOutput:
            self._act("step")
            tokens = {
                share.sequence_id: SampledToken(token_id=share.sequence_id + step.step_id)
                for share in step.scheduled
                if share.samples
            }
            return StepOutput(step_id=step.step_id, sampled=tokens)

        return collect

    def shutdown(self) -> None:
        self.runner = None


if __name__ == "__main__":
    match actions(int(sys.argv[sys.argv.index("--rank") + 1])).get("connect"):
        case ["sleep", seconds]:
            time.sleep(seconds)
        case ["exit", status]:
            print("about to exit", file=sys.stderr)
            sys.exit(status)
    main(ScriptedShard)
