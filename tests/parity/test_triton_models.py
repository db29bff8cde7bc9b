"""Whole models on the Triton kernels, with graphs and steps queued ahead, against the torch kernels step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import create_checkpoint
from triton_setup import DEVICE

from cluster import kernels
from cluster.core.request import SamplingParams
from cluster.core.step import NewSequence, SampledToken, ScheduledSequence, StepInput, StepOutput
from cluster.kernels.triton.packed_weight import PackedWeight, unpack
from cluster.models.config import ConfigFile
from cluster.models.loader import LoadOptions, ModelLoader
from cluster.models.registry import Model
from cluster.worker.cuda_graph import CudaCapture
from cluster.worker.cuda_runner import CudaRunner
from cluster.worker.input_batch import InputBatch
from cluster.worker.kv_cache import KVCacheShape
from cluster.worker.model_runner import ModelRunner

FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {"head_dim": 24},
    "MistralForCausalLM": {"sliding_window": 6},
}
PROMPTS = [[5, 6, 7], [9] * 4 + [30, 31, 32, 33, 34], [200]]
MAX_LEN, BLOCK_SIZE, NUM_STEPS = 48, 4, 5


@pytest.fixture(autouse=True)
def torch_again() -> Iterator[None]:
    before = kernels.current()
    yield
    kernels.use(before)


def load(checkpoint: Path, backend: kernels.Backend, weights: str = "float32") -> Model:
    options = LoadOptions(backend=backend, weights=weights, dtype=torch.float32, device=DEVICE)
    return ModelLoader(checkpoint, ConfigFile.read(checkpoint / "config.json"), options).load()


def create_parts(model: Model) -> tuple[InputBatch, list[torch.Tensor]]:
    shape = KVCacheShape(
        num_layers=model.num_layers,
        block_size=BLOCK_SIZE,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=torch.float32,
    )
    batch = InputBatch(max_num_seqs=3, max_model_len=MAX_LEN, block_size=BLOCK_SIZE)
    return batch, shape.allocate(64, DEVICE)


def create_steps() -> list[StepInput]:
    """The prompts in two chunks, the second beside others' decodes; then decodes of all."""
    sampling = SamplingParams(temperature=0.0, logprobs=2, max_tokens=20)
    steps, computed = [], [0] * len(PROMPTS)
    for step_id in range(NUM_STEPS):
        new, scheduled = [], []
        for i, prompt in enumerate(PROMPTS):
            if step_id == 0:
                new.append(
                    NewSequence(
                        sequence_id=i,
                        token_ids=prompt,
                        num_prompt_tokens=len(prompt),
                        sampling=sampling,
                        candidate_index=0,
                        stop_token_ids=(),
                    )
                )
            missing = len(prompt) - computed[i]
            count = min(missing, 5) if missing > 0 else 1
            scheduled.append(
                ScheduledSequence(
                    sequence_id=i,
                    num_computed_tokens=computed[i],
                    num_new_tokens=count,
                    new_block_ids=tuple(range(20 * i, 20 * i + 12)) if step_id == 0 else (),
                    samples=count >= missing,
                )
            )
            computed[i] += count
        steps.append(StepInput(step_id=step_id, new=tuple(new), scheduled=tuple(scheduled), dropped=()))
    return steps


def run_ahead(launch: Callable[[StepInput], Callable[[], StepOutput]]) -> list[dict[int, SampledToken]]:
    collects = [launch(step) for step in create_steps()]
    return [collect().sampled for collect in collects]


def fake_capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], Any], torch.Tensor]:
    output = run().clone()
    return lambda: output.copy_(run()), output


def run_plain(model: Model) -> list[dict[int, SampledToken]]:
    kernels.use(kernels.backend("torch"))
    runner = ModelRunner(model, *create_parts(model), dtype=torch.float32, device=DEVICE)
    return [runner.launch(step)().sampled for step in create_steps()]


def run_triton(model: Model, backend: kernels.Backend) -> list[dict[int, SampledToken]]:
    kernels.use(backend)
    runner = CudaRunner(
        model,
        *create_parts(model),
        max_num_seqs=3,
        max_model_len=MAX_LEN,
        dtype=torch.float32,
        device=DEVICE,
        capture=CudaCapture(DEVICE) if DEVICE.type == "cuda" else fake_capture,
    )
    return run_ahead(runner.launch)


def assert_same(outputs: list[dict[int, SampledToken]], expected: list[dict[int, SampledToken]]) -> None:
    assert [len(sampled) for sampled in outputs] == [2, *[3] * (NUM_STEPS - 1)]
    for sampled, others in zip(outputs, expected, strict=True):
        for sequence_id, token in sampled.items():
            assert token.token_id == others[sequence_id].token_id
            assert token.logprob == pytest.approx(others[sequence_id].logprob, abs=2e-4)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_models(architecture: str, tmp_path: Path) -> None:
    checkpoint = create_checkpoint(tmp_path, architecture, **FAMILIES[architecture])
    triton = kernels.backend("triton", batch_invariant=architecture != "LlamaForCausalLM")
    expected = run_plain(load(checkpoint, kernels.backend("torch")))
    assert_same(run_triton(load(checkpoint, triton), triton), expected)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights(weights: str, tmp_path: Path) -> None:
    """As a dense model whose weights are those that the quantized one computes with."""
    checkpoint = create_checkpoint(tmp_path, "Qwen2ForCausalLM", tie_word_embeddings=True)
    triton = kernels.backend("triton")
    quantized, dense = load(checkpoint, triton, weights), load(checkpoint, kernels.backend("torch"))
    formats = set()
    for ours, plain in zip(quantized.modules(), dense.modules(), strict=True):
        if isinstance(packed := getattr(ours, "weight", None), PackedWeight):
            formats.add((packed.format, packed.out_features == dense.vocab_size))
            assert (unpack(packed) - plain.weight).abs().mean() < 0.15 * plain.weight.abs().mean()
            plain.weight = unpack(packed)
    assert formats == {(weights, False), ("int8", True)}
    assert_same(run_triton(quantized, triton), run_plain(dense))
