"""Models cut by heads, MLP and vocabulary against the same models whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import create_checkpoint
from model_parts import ModelParts, check_equal, run_steps
from thread_communicator import ThreadCommunicator, ThreadGroup
from torch import Tensor

from cluster import kernels
from cluster.distributed.layout import Layout
from cluster.distributed.shm import ShmCommunicator, segment_path
from cluster.errors import ConfigError, Unsupported
from cluster.kernels import reference
from cluster.kernels.cpu import linear as cpu_linear
from cluster.kernels.cpu.library import library
from cluster.kernels.cpu.program import Arena, record
from cluster.layers.row_parallel import RowParallelLinear
from cluster.layers.span import Span
from cluster.layers.vocabulary_parallel import VocabularyParallelEmbedding
from cluster.models.config import ConfigFile, ModelConfig
from cluster.models.loader import LoadOptions, ModelLoader
from cluster.models.tensor_parallel import cut_by_groups, kv_heads_of, tp_sizes, vocabulary_of

compiled = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
KINDS = ["torch", pytest.param("cpu", marks=compiled)]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-mqa": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama-mha": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama-8-heads": ("LlamaForCausalLM", {"num_attention_heads": 8, "head_dim": 24}),
    "llama-odd-sizes": ("LlamaForCausalLM", {"intermediate_size": 101, "vocab_size": 262}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 13}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
}


class NoSums:
    def all_reduce_(self, x: Tensor) -> None:
        """Leaves x as it is."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_and_four_ranks_give_what_one_gives(variant: str, kind: str, tmp_path: Path):
    """With four ranks and two key-value heads, two ranks share a head."""
    architecture, config = VARIANTS[variant]
    checkpoint = create_checkpoint(tmp_path, architecture, **config)
    expected = run_steps(ModelParts(checkpoint, kind=kind))
    for tp_size in (2, 4):
        parts = ModelParts(checkpoint, kind=kind, tp_size=tp_size)
        check_equal(parts, expected)


@pytest.mark.parametrize("layer", [RowParallelLinear, VocabularyParallelEmbedding])
def test_a_sum_left_out_is_seen(layer: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Negative control: one layer of the model keeps each rank's own part."""
    checkpoint = create_checkpoint(tmp_path)
    expected = run_steps(ModelParts(checkpoint))
    parts = ModelParts(checkpoint, tp_size=2)
    check_equal(parts, expected)
    for rank in parts.ranks:
        broken = next(module for module in rank.model.modules() if isinstance(module, layer))
        monkeypatch.setattr(broken, "_tp", NoSums())
    with pytest.raises(AssertionError):
        check_equal(parts, expected)


def test_another_ranks_columns_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Negative control: all ranks sum, but over the wrong inputs of one product."""
    checkpoint = create_checkpoint(tmp_path)
    expected = run_steps(ModelParts(checkpoint))
    parts = ModelParts(checkpoint, tp_size=2)
    first, second = (rank.model.model.layers["1"].mlp.down_proj for rank in parts.ranks)
    first.weight, second.weight = second.weight, first.weight
    with pytest.raises(AssertionError):
        check_equal(parts, expected)


@compiled
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_packed_weights_in_parts_lose_no_more_than_whole_ones(weights: str, tmp_path: Path):
    checkpoint = create_checkpoint(
        tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64, dtype=torch.bfloat16
    )
    exact = run_steps(ModelParts(checkpoint))[1]

    def error(tp_size: int) -> float:
        logits = run_steps(ModelParts(checkpoint, kind="cpu", weights=weights, tp_size=tp_size))[1]
        return float((logits - exact).square().mean().sqrt() / exact.std())

    whole, parts = error(1), error(2)
    assert parts <= 1e-5 if weights == "bfloat16" else 1e-3 < parts <= 1.1 * whole


@compiled
@pytest.mark.parametrize(("intermediate_size", "columns"), [(512, [256, 256]), (640, [320, 320])])
def test_int4_groups_of_cut_inputs(intermediate_size: int, columns: list[int], tmp_path: Path):
    """Those of the whole matrix where both ranks get as many of them; five groups of 128 are cut elsewhere."""
    checkpoint = create_checkpoint(
        tmp_path,
        hidden_size=256,
        intermediate_size=intermediate_size,
        num_attention_heads=4,
        head_dim=64,
        num_hidden_layers=1,
    )
    ranks = [
        rank for tp_size in (1, 2) for rank in ModelParts(checkpoint, kind="cpu", weights="int4", tp_size=tp_size).ranks
    ]
    for name, is_equal in (("self_attn.o_proj", True), ("mlp.down_proj", columns[0] % 128 == 0)):
        whole, *parts = (cpu_linear.unpack(r.model.get_submodule(f"model.layers.0.{name}").weight) for r in ranks)
        assert torch.equal(torch.cat(parts, dim=1), whole) == is_equal
    assert [part.shape[1] for part in parts] == columns


class TestCuts:
    def test_of_an_mlp(self):
        def sizes(size: int, num_parts: int, group_size: int) -> list[int]:
            spans = cut_by_groups(size, num_parts, group_size)
            assert [span.first for span in spans] == [0, *(span.last for span in spans[:-1])]
            assert spans[-1].last == size
            return [span.size for span in spans]

        assert sizes(14_336, 4, 128) == [3584] * 4
        assert sizes(4864, 4, 128) == [9 * 128, 10 * 128, 9 * 128, 10 * 128]
        assert sizes(112, 2, 112) == [56, 56]  # groups and tiles would leave one rank more than a tenth more
        assert sizes(101, 4, 1) == [25, 25, 25, 26]

    def test_key_value_heads(self):
        assert [(s.first, s.last) for s in kv_heads_of(8, 4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]
        assert [(s.first, s.last) for s in kv_heads_of(2, 8)] == [(0, 1)] * 4 + [(1, 2)] * 4

    def test_a_vocabulary_smaller_than_its_parts(self):
        spans, rows = vocabulary_of(5, 4)
        assert [(s.first, s.last) for s in spans] == [(0, 2), (2, 4), (4, 5), (5, 5)]
        assert rows == 2


def test_every_rank_says_which_ids_it_has(tmp_path: Path):
    ranks = ModelParts(create_checkpoint(tmp_path), tp_size=4).ranks
    assert [rank.model.vocab_range for rank in ranks] == [(0, 65), (65, 130), (130, 195), (195, 259)]
    assert {rank.model.vocab_size for rank in ranks} == {259}
    assert {rank.model.num_kv_heads for rank in ranks} == {1}
    hidden = torch.randn(2, 64)
    padding = ranks[3].model.compute_logits(hidden)[:, 64:]
    assert padding.shape == (2, 1)
    assert (padding == 0).all()


class TestRefusals:
    def test_heads_that_do_not_divide(self, tmp_path: Path):
        checkpoint = create_checkpoint(tmp_path, hidden_size=96, num_attention_heads=6)
        with pytest.raises(ConfigError, match=r"6 query heads and 2 key-value heads.*to 1 or 2 or 6") as caught:
            ModelParts(checkpoint, tp_size=3)
        assert caught.value.field == "parallel.tp"

    def test_sizes_that_work(self, tmp_path: Path):
        checkpoint = create_checkpoint(tmp_path)
        config = ModelConfig.from_file(ConfigFile.read(checkpoint / "config.json"))
        for heads, kv_heads, expected in ((32, 8, [1, 2, 4, 8, 16, 32]), (14, 2, [1, 2, 14]), (12, 4, [1, 2, 4, 12])):
            sizes = tp_sizes(dataclasses.replace(config, num_attention_heads=heads, num_key_value_heads=kv_heads))
            assert sizes == expected

    def test_a_communicator_of_another_size(self, tmp_path: Path):
        checkpoint = create_checkpoint(tmp_path)
        options = LoadOptions(
            backend=kernels.backend("torch"), weights="float32", dtype=torch.float32, device=torch.device("cpu")
        )
        file = ConfigFile.read(checkpoint / "config.json")
        for tp in (None, ThreadCommunicator(ThreadGroup(4), 1)):
            with pytest.raises(ValueError, match="rank 1 of 2 needs a communicator"):
                ModelLoader(checkpoint, file, options, layout=Layout(rank=1, tp_size=2), tp=tp)

    @pytest.mark.parametrize("layout", [Layout(tp_size=2), Layout(pp_size=3, layers=(0, 1))])
    def test_the_transformers_back_end(self, layout: Layout, tmp_path: Path):
        from cluster.models.transformers_model import TransformersModel

        checkpoint = create_checkpoint(tmp_path, "Olmo2ForCausalLM")
        with pytest.raises(Unsupported, match=r"Olmo2ForCausalLM.*set parallel\.tp and parallel\.pp to 1"):
            TransformersModel.from_checkpoint(checkpoint, torch.float32, torch.device("cpu"), layout)


class TestEmbedding:
    IDS = torch.tensor([0, 16, 17, 40, 41, 99, 20])

    @pytest.mark.parametrize("first_id", [0, 17, 90])
    def test_ids_of_others_are_zeros(self, first_id: int):
        kernels.use(kernels.backend("torch"))
        weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
        found = kernels.embedding(self.IDS, weight, first_id=first_id)
        assert torch.equal(found, reference.embedding(self.IDS, weight, first_id=first_id))
        for row, token in zip(found, self.IDS.tolist(), strict=True):
            held = first_id <= token < first_id + 24
            assert torch.equal(row, weight[token - first_id] if held else torch.zeros(32))

    @compiled
    @pytest.mark.parametrize("format", cpu_linear.FORMATS)
    @pytest.mark.parametrize("first_id", [0, 17, 90])
    def test_packed(self, format: cpu_linear.WeightFormat, first_id: int):
        packed = cpu_linear.pack(torch.randn(24, 96, generator=torch.Generator().manual_seed(0)), format)
        expected = reference.embedding(self.IDS, cpu_linear.unpack(packed), first_id=first_id)
        assert torch.equal(cpu_linear.embedding(self.IDS, packed, first_id=first_id), expected)


@compiled
def test_a_step_over_shared_memory_can_be_recorded():
    """One rank, so that this process can be all of the group; the calls are those of any other."""
    tp = ShmCommunicator(segment_path(), 0, 1, timeout_s=10.0)
    try:
        kernels.use(kernels.backend("cpu"))
        table = torch.randn(50, 96)
        ids = torch.tensor([3, 49, 7])
        embedding = VocabularyParallelEmbedding(Span(20, 60, 100), 40, 96, tp)
        del embedding.weight
        embedding.weight = cpu_linear.pack(table[:40], "float32")
        product = RowParallelLinear(Span(0, 96, 192), 64, tp, bias=True)
        del product.weight, product.bias
        product.weight, product.bias = cpu_linear.pack(torch.randn(64, 96), "int8"), torch.randn(64)

        def step() -> Tensor:
            return product(embedding(ids))

        program = record(library(), Arena(2**20), step)
        ids.copy_(torch.tensor([20, 59, 60]))
        found = program.run().clone()
        assert torch.equal(found, step())
        assert torch.equal(found[2], product.bias)
    finally:
        tp.close()
