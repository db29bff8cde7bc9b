"""With the C kernels a request's tokens and log probabilities are bit-equal alone, in any batch, with its prompt whole
or in chunks, and on any number of threads."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import create_checkpoint
from parity_runs import create_engine, create_prompts, run_engine

from cluster import kernels
from cluster.checkpoint import resolve_checkpoint
from cluster.core.request import SamplingParams
from cluster.core.step import SampledToken
from cluster.engine.engine import Engine
from cluster.kernels.cpu.library import library
from cluster.kernels.cpu.linear import PackedWeight, unpack

pytestmark = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")

LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 90, 100)
NUM_SEQS = 33
PROMPTS = create_prompts([LENGTHS[index % len(LENGTHS)] for index in range(NUM_SEQS)])
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3)
DRAWN = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=12, ignore_eos=True, logprobs=3, seed=5)
SAMPLING = [DRAWN if index % 2 else GREEDY for index in range(NUM_SEQS)]
WATCHED = (0, 5, 13, 16, 27, 32)  # of the batch's prompts, those that also run alone; as many drawn as greedy
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "a batch": {},
    "a batch in chunks": {"max_num_batched_tokens": 40},
    "a batch on two threads": {"num_threads": 2},
    "a batch in chunks on two threads": {"max_num_batched_tokens": 53, "num_threads": 2},
}


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Odd sizes: inputs that are no multiple of a group, outputs that fill no tile."""
    return create_checkpoint(
        tmp_path_factory.mktemp("gqa"),
        "Qwen2ForCausalLM",
        hidden_size=120,
        intermediate_size=200,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
    )


@pytest.fixture(params=["demo", "gqa"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return resolve_checkpoint("demo") if request.param == "demo" else request.getfixturevalue("gqa")


def create(checkpoint: Path, weights: str, **options: Any) -> Engine:
    settings: dict[str, Any] = {"max_num_seqs": NUM_SEQS, "kv_cache_bytes": 2**26, "weights": weights} | options
    engine = create_engine(checkpoint, **settings)
    assert engine.model.batch_invariant
    return engine


def run_alone(checkpoint: Path, weights: str) -> list[list[SampledToken]]:
    """Each watched prompt by itself."""
    engine = create(checkpoint, weights, prefix_cache=False)
    return [run_engine(engine, [PROMPTS[index]], [SAMPLING[index]])[0] for index in WATCHED]


run_alone_once = cache(run_alone)


def differing(alone: list[list[SampledToken]], checkpoint: Path, weights: str, arrangement: str) -> list[int]:
    """Those of the watched prompts whose tokens or log probabilities differ by one bit from their run alone."""
    together = run_engine(create(checkpoint, weights, **ARRANGEMENTS[arrangement]), PROMPTS, SAMPLING)
    return [index for index, tokens in zip(WATCHED, alone, strict=True) if tokens != together[index]]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_tokens_and_logprobs_are_bit_equal_alone_and_in(arrangement: str, weights: str, checkpoint: Path):
    assert differing(run_alone_once(checkpoint, weights), checkpoint, weights, arrangement) == []


def test_a_product_that_sums_in_another_order_for_several_rows_is_seen(gqa: Path, monkeypatch: pytest.MonkeyPatch):
    """Negative control: the same numbers, summed by another product where there is more than one row."""
    own = kernels.backend("cpu").functions["linear"]

    def by_rows(x_TI: torch.Tensor, weight: PackedWeight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        return own(x_TI, weight, bias_O) if x_TI.shape[0] == 1 else F.linear(x_TI, unpack(weight), bias_O)

    kernels.use(kernels.backend("cpu"))
    monkeypatch.setattr(kernels, "linear", by_rows)
    assert differing(run_alone(gqa, "float32"), gqa, "float32", "a batch") != []


def test_torchs_kernels_say_that_they_are_not(gqa: Path):
    assert not create_engine(gqa, kernels="torch").model.batch_invariant
