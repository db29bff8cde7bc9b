"""Ours and other engines on one checkpoint of random weights, side by side in one run.

    python tests/bench/peers.py [--shape qwen2.5-0.5b] [--rounds 3] [--engines cluster,openvino:int8,...]
        [--python vllm=/path/to/venv/bin/python ...] [--work DIR] [--json FILE]

Each engine runs in a process of its own, in the interpreter of its own environment (the package's ``[bench]`` extra has
those that live together with it), one at a time, and the rounds take turns: what the machine does to one round it does
to all engines of it. Requests are handed over together; prompts differ; greedy, no end of text.

Where a peer has it easier: CTranslate2 and transformers get all prompts at once and of one length, in a static batch
without padding, with neither scheduler nor paged memory; OpenVINO computes in bfloat16 with a KV cache of 8 bits where
the processor can, while ours keeps float32 for both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_checkpoints import convert, create_source
from peer_results import bars_of, figures_of, table_of
from peer_runners.protocol import Task

from cluster.bench.shapes import Shape, WeightDtype, shape_named
from cluster.bench.stamp import stamp
from cluster.cli.output import print_table

_RUNNERS = Path(__file__).resolve().parent / "peer_runners"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine in one number format.

    Attributes:
        program: whose runner and interpreter; also its converter's name where it has a format of its own.
        mode: as the runner takes it, and the converter.
        source: of the checkpoint; quantizing engines start where published checkpoints are.
    """

    program: str
    mode: str
    source: WeightDtype = "bfloat16"
    converted: bool = False

    @property
    def name(self) -> str:
        return f"{self.program} {self.mode}"


ENGINES = (
    Engine(program="cluster", mode="float32"),
    Engine(program="cluster", mode="bfloat16"),
    Engine(program="cluster", mode="int8"),
    Engine(program="cluster", mode="int4"),
    Engine(program="openvino", mode="int8", converted=True),
    Engine(program="openvino", mode="int4", converted=True),
    Engine(program="ctranslate2", mode="int8", converted=True),
    Engine(program="vllm", mode="float32"),
    Engine(program="vllm", mode="bfloat16"),
    Engine(program="transformers", mode="float32"),
)


def prepare(engine: Engine, shape: Shape, work: Path, pythons: Mapping[str, str]) -> Path:
    """The engine's checkpoint. Its converter may have an environment of its own, named ``PROGRAM-export``."""
    source = create_source(shape, engine.source, work)
    if not engine.converted:
        return source
    python = pythons.get(f"{engine.program}-export") or pythons.get(engine.program, sys.executable)
    return convert(source, engine.program, python, engine.mode)


def run_once(engine: Engine, python: str, task: Task) -> list[dict[str, Any]]:
    """The runner's lines, with the time of each.

    Raises:
        RuntimeError: the runner failed; the message ends with what it said.
    """
    command = [python, str(_RUNNERS / f"run_{engine.program}.py"), json.dumps(asdict(task))]
    start = time.monotonic()
    # A file, not a pipe: nobody reads it while the runner runs.
    with (
        open(Path(task.model) / f"{engine.program}-{engine.mode}.log", "w+") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_environment(python),
            cwd=task.model,  # here, packages of the repository would stand in for others of the same name
        ) as process,
    ):
        lines = [json.loads(line) | {"at_s": time.monotonic() - start} for line in process.stdout or ()]
        if process.wait() != 0:
            log.seek(0)
            raise RuntimeError(f"{engine.name} ended with exit code {process.returncode}:\n{log.read()[-2000:]}")
    return lines


def _environment(python: str) -> dict[str, str]:
    """With the allocator and the threads' library that vLLM's documentation asks for, where they are installed."""
    libraries = [Path(python).parents[1] / "lib" / "libiomp5.so", *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
    preload = [str(path) for path in libraries if path.exists()] if libraries[0].exists() else []
    return os.environ | ({"LD_PRELOAD": ":".join(preload)} if preload else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--engines", help="programs, or program:mode, separated by commas; default: all")
    parser.add_argument("--python", action="append", default=[], metavar="PROGRAM=PATH", help="its interpreter")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "cluster-peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", default="1,8,16,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pythons = dict(option.split("=", 1) for option in args.python)
    wanted = args.engines.split(",") if args.engines else [engine.program for engine in ENGINES]
    engines = [e for e in ENGINES if e.program in wanted or f"{e.program}:{e.mode}" in wanted]
    shape, batches = shape_named(args.shape), [int(batch) for batch in args.batches.split(",")]

    rounds: dict[str, list[list[dict[str, Any]]]] = {}
    failures: dict[str, str] = {}
    for round_index in range(args.rounds):
        for engine in engines:
            if engine.name in failures:
                continue
            python = pythons.get(engine.program, sys.executable)
            print(f"round {round_index + 1}: {engine.name}", file=sys.stderr)
            try:
                task = Task(
                    model=str(prepare(engine, shape, args.work, pythons)),
                    mode=engine.mode,
                    threads=args.threads,
                    vocab_size=shape.vocab_size,
                    prompt_tokens=args.prompt,
                    new_tokens=args.new,
                    batches=batches,
                    prefill_tokens=args.prefill,
                    prefill_rounds=3,
                    seed=round_index,
                )
                rounds.setdefault(engine.name, []).append(run_once(engine, python, task))
            except (RuntimeError, OSError) as error:
                failures[engine.name] = str(error)
                rounds.pop(engine.name, None)

    figures = {name: figures_of(lines, args.prefill) for name, lines in rounds.items()}
    columns = [f"{kind} {batch}" for kind in ("decode", "whole run") for batch in batches]
    columns += ["prefill", "first token", "peak memory"]
    print_table(["engine", *columns], table_of(figures, columns))
    print()
    print_table(["bar", "ours", "best peer", "ratio", "must", "reach", ""], bars_of(shape.name, figures))
    for name, why in failures.items():
        print(f"\n{name} did not run: {why}", file=sys.stderr)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "work", "python")}
        result = stamp() | {"settings": settings, "figures": figures, "bars": bars_of(shape.name, figures)}
        args.json.write_text(json.dumps(result | {"failures": failures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
