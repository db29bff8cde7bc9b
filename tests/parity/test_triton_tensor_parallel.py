"""Models cut into parts on the Triton kernels: dense, and with matrices that each rank has quantized for itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import create_checkpoint
from model_parts import ModelParts, check_near
from triton_setup import DEVICE  # before whatever imports triton

from cluster import kernels
from cluster.kernels import reference
from cluster.kernels.triton.linear import embedding
from cluster.kernels.triton.packed_weight import pack, unpack

SIZES = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "vocab_size": 70}
CONFIG = SIZES | {"bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def torch_again():
    before = kernels.current()
    yield
    kernels.use(before)


def run(parts: ModelParts) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states, logits) of a prompt and a token after it; few, as the interpreter is slow."""
    outputs = [parts.step([[5, 60, 7], [69]], [0, 0]), parts.step([[30], [31]], [3, 1])]
    hidden, logits = (torch.cat(part).cpu() for part in zip(*outputs, strict=True))
    return hidden, logits


@pytest.mark.parametrize("tp_size", [2, 4])
def test_dense(tp_size: int, tmp_path: Path):
    checkpoint = create_checkpoint(
        tmp_path, "Qwen2ForCausalLM", **CONFIG | {"tie_word_embeddings": True, "head_dim": 32}
    )
    parts = ModelParts(checkpoint, kind="triton", device=DEVICE, tp_size=tp_size)
    check_near(run(parts), run(ModelParts(checkpoint)))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_parts_lose_no_more_than_whole_matrices(weights: str, tmp_path: Path):
    checkpoint = create_checkpoint(tmp_path, **CONFIG)
    exact = run(ModelParts(checkpoint))[1]

    def error(tp_size: int) -> float:
        parts = ModelParts(checkpoint, kind="triton", device=DEVICE, weights=weights, tp_size=tp_size)
        return float((run(parts)[1] - exact).square().mean().sqrt() / exact.std())

    assert 1e-3 < error(2) <= 1.1 * error(1)


def test_int4_matrices_cut_between_groups_are_those_of_the_whole(tmp_path: Path):
    checkpoint = create_checkpoint(tmp_path, **CONFIG)
    ranks = [
        rank
        for tp_size in (1, 2)
        for rank in ModelParts(checkpoint, kind="triton", device=DEVICE, weights="int4", tp_size=tp_size).ranks
    ]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        whole, *parts = (unpack(rank.model.get_submodule(f"model.layers.0.{name}").weight) for rank in ranks)
        assert [part.shape[1] for part in parts] == [128, 128]
        assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("format", ["dense", "int8", "int4"])
def test_ids_of_others_are_zeros(format: str):
    ids = torch.tensor([0, 16, 17, 40, 41, 99, 20], device=DEVICE)
    dense = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight = dense if format == "dense" else pack(dense, format)
    numbers = dense if format == "dense" else unpack(weight)
    for first_id in (0, 17, 90):
        expected = reference.embedding(ids, numbers, first_id=first_id)
        assert torch.equal(embedding(ids, weight, first_id=first_id), expected)
