"""What an engine step costs beside the model's forward pass, by part, at several batch sizes.

    python tests/bench/bench_step.py [--vocab 151936] [--batch 1,8,32,64] [--sampling greedy,random,nucleus,logprobs]

The model is one whose forward pass is free and whose logits are made up beforehand: the shape of the step is that of a
decode in the middle of its run. Times are the fastest quartile's mean over the steps, in milliseconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.core.config import SchedulerConfig
from cluster.core.model_info import ModelInfo
from cluster.core.request import SamplingParams
from cluster.core.step import StepInput, StepOutput
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.submission import Submission
from cluster.kernels.cpu.library import library
from cluster.worker.input_batch import InputBatch
from cluster.worker.model_runner import ModelRunner

sys.path.insert(0, str(Path(__file__).resolve().parent))
from stamp import report

BLOCK_SIZE = 16
PROMPT_TOKENS = 128
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.8},
    "nucleus": {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}


class FreeModel:
    """A model of ready-made logits."""

    is_first_stage = is_last_stage = True

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self._logits_SV = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 3.0

    def __call__(self, input_ids_T: Tensor, *_: Any) -> Tensor:
        return torch.empty(len(input_ids_T), 1)

    def compute_logits(self, hidden_SD: Tensor) -> Tensor:
        return self._logits_SV[: len(hidden_SD)]


class FreeExecutor:
    """The executor of a FreeModel."""

    max_in_flight = 1

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        num_blocks = max_num_seqs * 64
        self.model = ModelInfo(
            architecture="Free", max_model_len=1024, vocab_size=vocab_size, eos_token_ids=(0,), dtype="float32",
            device="cpu", num_blocks=num_blocks, block_size=BLOCK_SIZE, backend="none",
        )  # fmt: skip
        self.batch = InputBatch(max_num_seqs=max_num_seqs, max_model_len=1024, block_size=BLOCK_SIZE)
        self.runner = ModelRunner(
            FreeModel(max_num_seqs, vocab_size), self.batch, [torch.zeros(2, num_blocks, BLOCK_SIZE, 1, 1)],
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip

    def submit(self, step: StepInput) -> None:
        self._step = step

    def collect(self) -> StepOutput:
        return self.runner.execute(self._step)

    def shutdown(self) -> None: ...


class Stopwatch:
    """Seconds of each part of a step: calls of the functions that it is put around."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, owner: Any, name: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        setattr(owner, name, timed)

    def lap(self) -> dict[str, float]:
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def measure(num_seqs: int, vocab_size: int, sampling: dict[str, Any], num_steps: int) -> dict[str, float]:
    """Milliseconds of a decode step by part."""
    executor = FreeExecutor(num_seqs, vocab_size)
    scheduler = SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=num_seqs * PROMPT_TOKENS)
    engine = Engine(executor, EngineConfig(scheduler=scheduler))
    stopwatch = Stopwatch()
    stopwatch.around(engine._scheduler, "schedule", "schedule")
    stopwatch.around(engine._scheduler, "update", "update")
    stopwatch.around(executor.batch, "apply", "arrays")
    stopwatch.around(executor.batch, "arrays", "arrays")
    stopwatch.around(executor, "collect", "worker")
    stopwatch.around(executor.runner, "_sample", "sample")
    generator = torch.Generator().manual_seed(1)
    for index in range(num_seqs):
        engine.add(
            Submission(
                submission_id=index,
                prompt_token_ids=torch.randint(0, vocab_size, (PROMPT_TOKENS,), generator=generator).tolist(),
                sampling=SamplingParams(seed=index, ignore_eos=True, **sampling),
            )
        )
    laps = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        laps.append({"total": time.perf_counter() - start} | stopwatch.lap())
    best = sorted(laps, key=lambda lap: lap["total"])[: max(1, num_steps // 4)]
    mean = {part: 1e3 * sum(lap[part] for lap in best) / len(best) for part in best[0]}
    worker = mean.pop("worker")
    mean["runner"] = worker - mean["arrays"] - mean["sample"]
    mean["engine"] = mean["total"] - worker - mean["schedule"] - mean["update"]
    return {part: round(value, 3) for part, value in mean.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--batch", default="1,8,32,64")
    parser.add_argument("--sampling", default=",".join(SAMPLING))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu_library = library()
    if cpu_library is not None:
        cpu_library.set_num_threads(args.threads)
    result: dict[str, Any] = {"vocab": args.vocab, "threads": args.threads}
    for name in args.sampling.split(","):
        for num_seqs in map(int, args.batch.split(",")):
            result[f"{name} {num_seqs}"] = measure(num_seqs, args.vocab, SAMPLING[name], args.steps)
    report(result)


if __name__ == "__main__":
    main()
