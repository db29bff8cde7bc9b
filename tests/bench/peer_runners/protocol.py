"""What every engine under comparison does, in a process of its own: load, first token, prompts, batches.

Standard library only: each engine runs in the interpreter of its own environment. The task is one line of JSON on the
command line; results are lines of JSON on standard output, and whatever the engine prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

OnTokens = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to measure.

    Attributes:
        model: directory of the checkpoint in the engine's own format.
        mode: the engine's number format.
        threads: CPU threads.
        vocab_size: prompts are drawn from it.
        prompt_tokens, new_tokens: of each request.
        batches: numbers of requests that run together, one after the other.
        prefill_tokens: length of the prompts whose computation alone is timed.
        prefill_rounds: how many of them.
        seed: of the prompts; all differ, so that no prefix cache has anything to find.
    """

    model: str
    mode: str
    threads: int
    vocab_size: int
    prompt_tokens: int
    new_tokens: int
    batches: list[int]
    prefill_tokens: int
    prefill_rounds: int
    seed: int

    @property
    def max_requests(self) -> int:
        return max(1, *self.batches)

    @property
    def max_tokens(self) -> int:
        """Of one request, prompt included."""
        return max(self.prompt_tokens + self.new_tokens, self.prefill_tokens + 1)


class Peer(Protocol):
    def generate(self, prompts: list[list[int]], new_tokens: int, on_tokens: OnTokens) -> None:
        """Greedy, to exactly ``new_tokens`` each; ``on_tokens(request, count)`` as soon as tokens are out."""


def serve(load: Callable[[Task], Peer]) -> None:
    """Runs the task on the command line. First of all, a runner's file imports no more than this module."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def report(**values: Any) -> None:
        results.write(json.dumps(values) + "\n")

    task = Task(**json.loads(sys.argv[1]))
    draw = random.Random(task.seed)

    def run(num_requests: int, prompt_tokens: int, new_tokens: int) -> list[tuple[float, int, int]]:
        # The first few ids are special tokens in some vocabularies.
        prompts = [[draw.randrange(16, task.vocab_size) for _ in range(prompt_tokens)] for _ in range(num_requests)]
        events: list[tuple[float, int, int]] = []
        start = time.perf_counter()
        peer.generate(
            prompts, new_tokens, lambda index, count: events.append((time.perf_counter() - start, index, count))
        )
        return events

    peer = load(task)
    run(1, task.prompt_tokens, 1)
    report(kind="first token")
    # A run of each size that does not count goes first: some engines compile or allocate for it.
    run(1, task.prefill_tokens, 1)
    for _ in range(task.prefill_rounds):
        report(kind="prefill", num_requests=1, events=run(1, task.prefill_tokens, 1))
    for num_requests in task.batches:
        run(num_requests, task.prompt_tokens, 2)
        report(kind="batch", num_requests=num_requests, events=run(num_requests, task.prompt_tokens, task.new_tokens))
    report(kind="memory", peak_bytes=peak_memory())


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
