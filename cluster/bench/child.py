"""An engine in a process of its own, for what only a fresh process tells: the time to its first token, and its memory.

    python -m cluster.bench.child SETTINGS WORKLOAD

Both are JSON: an ``EngineSettings``, and a ``Workload``. Results are lines of JSON on standard output.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.bench.session import EngineSettings, Session, random_prompts


@dataclass(frozen=True, kw_only=True)
class Workload:
    """``num_requests`` requests, ``concurrent`` of them at a time, after one that gets its first token alone."""

    num_requests: int
    concurrent: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a fresh process did.

    Attributes:
        backend: model code and kernels that ran.
        first_token_s: from the start of the process to its first token, of a prompt as long as the others.
        tokens_per_s: of the workload, prompts included.
        peak_bytes: largest resident size of the process.
    """

    backend: str
    first_token_s: float
    tokens_per_s: float
    peak_bytes: int


def run_in_child(settings: EngineSettings, workload: Workload) -> Outcome:
    """Runs the workload in a fresh process.

    Raises:
        subprocess.CalledProcessError: it failed; it has said why on standard error.
    """
    command = [
        sys.executable,
        "-m",
        "cluster.bench.child",
        *(json.dumps(asdict(part)) for part in (settings, workload)),
    ]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        values: dict[str, Any] = {}
        for line in process.stdout or ():
            if not values:
                values["first_token_s"] = time.monotonic() - start
            values |= json.loads(line)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Outcome(**values)


def main(settings: EngineSettings, workload: Workload) -> None:
    draw = random.Random(0)
    with Session(settings) as session:
        vocab_size = session.model.vocab_size
        session.run(random_prompts(draw, 1, workload.prompt_tokens, vocab_size), 1)
        print(json.dumps({"backend": session.model.backend}), flush=True)
        seconds, num_tokens = 0.0, 0
        for first in range(0, workload.num_requests, workload.concurrent):
            num_prompts = min(workload.concurrent, workload.num_requests - first)
            prompts = random_prompts(draw, num_prompts, workload.prompt_tokens, vocab_size)
            timeline = session.run(prompts, workload.new_tokens).timeline
            seconds, num_tokens = seconds + timeline.end_s, num_tokens + timeline.num_tokens
        print(json.dumps({"tokens_per_s": num_tokens / seconds, "peak_bytes": _peak_bytes()}), flush=True)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(EngineSettings(**json.loads(sys.argv[1])), Workload(**json.loads(sys.argv[2])))
