"""However a run is cut into steps, it gives the tokens of the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import create_checkpoint
from parity_runs import create_engine, create_prompts, run_engine

from cluster.core.request import SamplingParams

FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 13},
    "Qwen3ForCausalLM": {"head_dim": 16},
}


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return create_checkpoint(tmp_path, request.param, **FAMILIES[request.param])


def assert_same(outputs: list[list[Any]], expected: list[list[Any]]) -> None:
    for output, wanted in zip(outputs, expected, strict=True):
        assert [t.token_id for t in output] == [t.token_id for t in wanted]
        assert max(abs(a.logprob - b.logprob) for a, b in zip(output, wanted, strict=True)) <= 1e-4


@pytest.mark.parametrize("max_num_batched_tokens", [8, 13, 31])
def test_chunked_prompts_equal_whole_ones(checkpoint: Path, max_num_batched_tokens: int):
    prompts = create_prompts()
    expected = run_engine(create_engine(checkpoint), prompts)
    assert_same(run_engine(create_engine(checkpoint, max_num_batched_tokens=max_num_batched_tokens), prompts), expected)


def test_preempted_sequences_equal_undisturbed_ones(checkpoint: Path):
    prompts = create_prompts()
    expected = run_engine(create_engine(checkpoint), prompts)
    engine = create_engine(checkpoint, num_blocks=14)
    assert_same(run_engine(engine, prompts), expected)
    assert engine.load().num_preemptions > 0
    assert engine.load().free_blocks == engine.load().num_blocks


def test_preempted_chunked_sampling_draws_the_same_tokens(checkpoint: Path):
    """Random draws and penalties look at the whole sequence, wherever it was cut."""
    prompts = create_prompts()
    sampling = SamplingParams(
        temperature=0.8, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.1, seed=11, max_tokens=48,
        ignore_eos=True, logprobs=0, min_tokens=3, stop_token_ids=(1, 2),
    )  # fmt: skip
    expected = run_engine(create_engine(checkpoint), prompts, sampling)
    engine = create_engine(checkpoint, num_blocks=14, max_num_batched_tokens=24)
    assert_same(run_engine(engine, prompts, sampling), expected)
    assert engine.load().num_preemptions > 0


def test_one_by_one_equals_all_together(checkpoint: Path):
    prompts = create_prompts()
    expected = run_engine(create_engine(checkpoint), prompts)
    assert_same(run_engine(create_engine(checkpoint, max_num_seqs=1), prompts), expected)


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_the_block_size_changes_nothing(checkpoint: Path, block_size: int):
    prompts = create_prompts()
    expected = run_engine(create_engine(checkpoint), prompts)
    assert_same(run_engine(create_engine(checkpoint, block_size=block_size), prompts), expected)
