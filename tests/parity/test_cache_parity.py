"""Whatever of a sequence's KV is found, shared, parked or computed in pieces, its tokens stay the same.

Where the engine says that it is batch invariant, as on our CPU kernels, their log probabilities stay the same to the
last bit. On torch's they do not: the order of a sum depends on the batch there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import create_checkpoint
from parity_runs import NUM_TOKENS, create_engine, create_prompts, run_engine
from torch import Tensor

from cluster.core.request import SamplingParams
from cluster.core.step import ParkedBlocks, SampledToken
from cluster.engine.engine import Engine
from cluster.engine.submission import Submission
from cluster.kernels.cpu.library import library
from cluster.worker.host_blocks import HostBlocks

PROMPT, OTHER = create_prompts((57, 40))
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5)
RANDOM = SamplingParams(
    temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=11, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5
)
CreateEngine = Callable[..., Engine]


@pytest.fixture(params=["torch", "float32", "int8", "int4"])
def create(request: pytest.FixtureRequest, tmp_path: Path) -> CreateEngine:
    """Engines over one checkpoint: on torch's kernels, or on ours with weights of a format."""
    worker: dict[str, Any] = {"kernels": "torch"}
    if request.param != "torch":
        if library() is None:
            pytest.skip("the CPU kernels are not compiled")
        worker = {"weights": request.param, "weight_cache_dir": None, "kv_cache_dtype": "float32"}
    return partial(create_engine, create_checkpoint(tmp_path), **worker)


def is_same(
    engine: Engine, outputs: Sequence[Sequence[SampledToken]], expected: Sequence[Sequence[SampledToken]]
) -> bool:
    """Tokens, and log probabilities where the engine promises that."""
    if engine.model.batch_invariant:
        return outputs == expected
    return [[t.token_id for t in output] for output in outputs] == [[t.token_id for t in wanted] for wanted in expected]


def run(engine: Engine, prompt: list[int], sampling: SamplingParams) -> tuple[list[list[SampledToken]], int]:
    """Each candidate's tokens, and how many of the prompt's were cached."""
    engine.add(Submission(submission_id=0, prompt_token_ids=prompt, sampling=sampling))
    outputs: list[list[SampledToken]] = [[] for _ in range(sampling.n)]
    cached_tokens = 0
    while engine.has_work:
        for delta in engine.step().deltas:
            outputs[delta.candidate_index] += delta.logprobs
            cached_tokens = max(cached_tokens, delta.cached_tokens)
        engine.check_integrity()
    return outputs, cached_tokens


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_a_prefix_hit_equals_a_miss(create: CreateEngine, sampling: SamplingParams):
    expected, cached = run(create(prefix_cache=False), PROMPT, sampling)
    assert cached == 0
    engine = create()
    run(engine, PROMPT[:37] + OTHER, GREEDY)  # two whole blocks in common, and the beginning of a third
    outputs, cached = run(engine, PROMPT, sampling)
    assert cached == 32
    assert is_same(engine, outputs, expected)
    outputs, cached = run(engine, PROMPT, sampling)
    assert cached == 48
    assert is_same(engine, outputs, expected)
    # The conversation goes on: prompt and completion come back as a prompt.
    follow = PROMPT + [token.token_id for token in expected[0][:40]]
    again, cached = run(engine, follow, GREEDY)
    assert cached == 96
    assert is_same(engine, again, run(create(), follow, GREEDY)[0])


def test_candidates_that_share_equal_candidates_that_run_alone(create: CreateEngine):
    engine, sampling = create(), SamplingParams(**vars(RANDOM) | {"n": 3})
    together, _ = run(engine, PROMPT, sampling)
    assert is_same(engine, together, run(create(max_num_seqs=1, prefix_cache=False), PROMPT, sampling)[0])
    assert is_same(engine, together[:1], run(create(), PROMPT, RANDOM)[0])
    assert len({tuple(token.token_id for token in output) for output in together}) == 3


def watch_resumed(
    monkeypatch: pytest.MonkeyPatch, damage: Callable[[Tensor], object] = lambda block: None
) -> list[ParkedBlocks]:
    """What is resumed from now on; ``damage`` is done to the keys of the first block in the first layer each time."""
    resumed: list[ParkedBlocks] = []
    resume = HostBlocks._resume

    def watched(self: HostBlocks, blocks: ParkedBlocks) -> None:
        resume(self, blocks)
        resumed.append(blocks)
        damage(self._kv_caches[0][0, blocks.block_ids[0]])

    monkeypatch.setattr(HostBlocks, "_resume", watched)
    return resumed


def test_parked_sequences_equal_undisturbed_ones(create: CreateEngine, monkeypatch: pytest.MonkeyPatch):
    prompts = create_prompts()
    expected = run_engine(create(), prompts)
    resumed = watch_resumed(monkeypatch)
    engine = create(num_blocks=14)
    assert is_same(engine, run_engine(engine, prompts), expected)
    assert engine.load().num_preemptions > 0
    assert resumed
    assert engine.load().free_blocks == engine.load().num_blocks


def test_a_block_that_comes_back_damaged_is_seen(create: CreateEngine, monkeypatch: pytest.MonkeyPatch):
    """The comparison above would notice."""
    prompts = create_prompts()
    expected = run_engine(create(), prompts)
    resumed = watch_resumed(monkeypatch, damage=lambda block: block.copy_(block.flip(0)))
    engine = create(num_blocks=14)
    assert not is_same(engine, run_engine(engine, prompts), expected)
    assert resumed


@pytest.mark.parametrize("max_num_batched_tokens", [8, 13, 31])
def test_chunks_change_nothing(create: CreateEngine, max_num_batched_tokens: int):
    prompts = create_prompts()
    engine = create(max_num_batched_tokens=max_num_batched_tokens)
    assert is_same(engine, run_engine(engine, prompts), run_engine(create(), prompts))


def test_neighbours_change_nothing(create: CreateEngine):
    prompts = create_prompts()
    engine = create(max_num_seqs=1)
    assert is_same(engine, run_engine(engine, prompts), run_engine(create(), prompts))
