"""A group of shards beside one shard of as many threads, on one model, by turns in one run.

    python tests/bench/bench_groups.py [--shape qwen2.5-0.5b] [--weights int8] [--rounds 3] [--json FILE]

tp2 and pp2 with a thread each, one shard with two. Decode counts from when every request has its first token; prefill
is prompts of 512 tokens, as many tokens a second as are computed until all have their first.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from cluster.bench.session import EngineSettings, Session, random_prompts
from cluster.bench.shapes import shape_named, write_checkpoint
from cluster.bench.stamp import stamp

GROUPS = {"one": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}
PROMPT_TOKENS, NEW_TOKENS = 128, 32
PREFILL_TOKENS = 512


def measure(checkpoint: Path, weights: str, group: str, num_requests: int, num_prefills: int) -> dict[str, float]:
    tp, pp = GROUPS[group]
    settings = EngineSettings(
        checkpoint=str(checkpoint),
        weights=weights,
        num_threads=2,
        max_num_seqs=num_requests,
        load_format="dummy",
        tp=tp,
        pp=pp,
    )
    draw = random.Random(0)
    with Session(settings) as session:
        vocab_size = session.model.vocab_size
        session.run(random_prompts(draw, num_requests, 16, vocab_size), 4)  # programs are recorded, memory is touched
        prompts = random_prompts(draw, num_prefills, PREFILL_TOKENS, vocab_size)
        prefill_s = session.run(prompts, 1).timeline.end_s
        prompts = random_prompts(draw, num_requests, PROMPT_TOKENS, vocab_size)
        timeline = session.run(prompts, NEW_TOKENS).timeline
    decode = timeline.decode_tokens_per_s
    assert decode is not None
    return {"decode tok/s": decode, "prefill tok/s": num_prefills * PREFILL_TOKENS / prefill_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = [("tp2", 16, 1), ("pp2", 64, 8)]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(shape_named(arguments.shape), Path(folder), weights=False)
        for _ in range(arguments.rounds):
            for group, num_requests, num_prefills in cases:
                for each in ("one", group):
                    figures = measure(checkpoint, arguments.weights, each, num_requests, num_prefills)
                    for name, value in figures.items():
                        found[f"{group}, {num_requests} requests: {name}"][each].append(value)
    results = {}
    for name, by_group in found.items():
        one, group = (statistics.median(values) for values in by_group.values())
        results[name] = {"one": one, "group": group, "ratio": group / one}
        print(f"{name:36} one shard {one:8.1f}   group {group:8.1f}   {group / one:.2f}x", flush=True)
    if arguments.json:
        settings = {"shape": arguments.shape, "weights": arguments.weights, "rounds": arguments.rounds}
        arguments.json.write_text(json.dumps(stamp() | settings | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
