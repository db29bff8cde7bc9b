"""Each rank reads and holds its part of a checkpoint, of made-up weights and of cached copies, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import create_checkpoint
from model_parts import ModelParts, Stages, check_equal, run_steps
from safetensors.torch import load_file

from cluster.errors import CheckpointError
from cluster.kernels.cpu import linear
from cluster.kernels.cpu.library import library
from cluster.kernels.cpu.linear import PackedWeight
from cluster.layers.span import Span
from cluster.models.tensor_source import CheckpointTensors, RandomTensors, TensorSource
from cluster.models.weight_cache import WeightCache

compiled = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
LAYOUTS: dict[str, tuple[int, Stages | None]] = {
    "tp2": (2, None),
    "tp4": (4, None),
    "pp2": (1, [(0, 2), (2, 4)]),
    "tp2-pp2": (2, [(0, 2), (2, 4)]),
}


class TestBytes:
    @pytest.mark.parametrize("kind", ["torch", pytest.param("cpu", marks=compiled)])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_rank_reads_its_share(self, layout: str, kind: str, tmp_path: Path):
        """Of a checkpoint whose parts are alike: heads and layers divide, embedding and head are of one size."""
        checkpoint = create_checkpoint(
            tmp_path, num_hidden_layers=4, num_key_value_heads=4, vocab_size=512, max_shard_size="200KB"
        )
        total = sum(sum(t.nbytes for t in load_file(file).values()) for file in checkpoint.glob("*.safetensors"))
        tp_size, stages = LAYOUTS[layout]
        (whole,) = ModelParts(checkpoint, kind=kind).ranks
        assert whole.loader.num_bytes_read == total
        ranks = ModelParts(checkpoint, kind=kind, tp_size=tp_size, stages=stages).ranks
        for rank in ranks:
            assert 0.95 * total / len(ranks) <= rank.loader.num_bytes_read <= 1.05 * total / len(ranks)
            assert rank.loader.num_bytes <= 1.05 * whole.loader.num_bytes / len(ranks)

    def test_shared_heads_and_tied_weights_are_read_where_they_are_held(self, tmp_path: Path):
        checkpoint = create_checkpoint(tmp_path, num_hidden_layers=2, num_key_value_heads=1, tie_word_embeddings=True)
        ranks = ModelParts(checkpoint, tp_size=2, stages=[(0, 1), (1, 2)]).ranks
        sizes = {name: t.nbytes for name, t in load_file(checkpoint / "model.safetensors").items()}
        norms = 2 * sizes["model.norm.weight"]
        layer = norms + sum(sizes[f"model.layers.0.self_attn.{kv}_proj.weight"] for kv in "kv")
        halves = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        layer += sum(sizes[f"model.layers.0.{name}.weight"] // 2 for name in halves)
        row = 64 * 4
        for rank, rows, ends in zip(ranks, (130, 129, 130, 129), (0, 0, 256, 256), strict=True):
            assert rank.loader.num_bytes_read == layer + rows * row + ends

    def test_reading_whole_rows_is_seen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Negative control: a reader that takes whole rows and cuts them afterwards goes over the share."""
        checkpoint = create_checkpoint(tmp_path, num_hidden_layers=4, num_key_value_heads=4, vocab_size=512)
        read = CheckpointTensors.read

        def whole_rows(source: CheckpointTensors, name: str, rows: Span, columns: Span | None) -> torch.Tensor:
            if columns is None:
                return read(source, name, rows, None)
            return read(source, name, rows, Span.whole(columns.of))[:, columns.first : columns.last]

        monkeypatch.setattr(CheckpointTensors, "read", whole_rows)
        ranks = ModelParts(checkpoint, tp_size=2).ranks
        (whole,) = ModelParts(checkpoint).ranks
        assert ranks[0].loader.num_bytes_read > 1.05 * whole.loader.num_bytes_read / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ((0, 64), (0, 112)),
        ((3, 40), (0, 112)),
        ((0, 64), (0, 56)),
        ((5, 6), (111, 112)),
        ((7, 31), (13, 90)),
        ((9, 9), (3, 5)),
    ],
)
class TestPieces:
    NAME = "model.layers.1.mlp.down_proj.weight"

    def check(self, source: TensorSource, whole: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> None:
        piece = source.read(self.NAME, Span(*rows, 64), Span(*columns, 112))
        assert torch.equal(piece, whole[slice(*rows), slice(*columns)])

    def test_of_a_checkpoint(self, rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype, tmp_path: Path):
        checkpoint = create_checkpoint(tmp_path, dtype=dtype)
        with CheckpointTensors(checkpoint) as source:
            self.check(source, load_file(checkpoint / "model.safetensors")[self.NAME], rows, columns)
            assert source.num_bytes_read == (rows[1] - rows[0]) * (columns[1] - columns[0]) * dtype.itemsize

    def test_of_random_numbers(self, rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype):
        source = RandomTensors()
        self.check(source, source.read(self.NAME, Span.whole(64), Span.whole(112)), rows, columns)


class TestRandomWeights:
    @pytest.mark.parametrize("kind", ["torch", pytest.param("cpu", marks=compiled)])
    @pytest.mark.parametrize("tied", [False, True])
    def test_parts_are_those_of_the_whole(self, kind: str, tied: bool, tmp_path: Path):
        checkpoint = create_checkpoint(tmp_path, "Qwen2ForCausalLM", num_hidden_layers=4, tie_word_embeddings=tied)
        (checkpoint / "model.safetensors").unlink()
        options: dict[str, Any] = {"kind": kind, "load_format": "dummy"}
        expected = run_steps(ModelParts(checkpoint, **options))
        for tp_size, stages in LAYOUTS.values():
            check_equal(ModelParts(checkpoint, tp_size=tp_size, stages=stages, **options), expected)


@compiled
class TestCache:
    @pytest.fixture
    def packed(self, monkeypatch: pytest.MonkeyPatch) -> list[PackedWeight]:
        """The matrices that are packed from here on."""
        seen: list[PackedWeight] = []
        pack_rows = PackedWeight.pack_rows

        def noting(weight: PackedWeight, first_row: int, rows_OI: torch.Tensor) -> None:
            seen.append(weight)
            pack_rows(weight, first_row, rows_OI)

        monkeypatch.setattr(PackedWeight, "pack_rows", noting)
        return seen

    def test_every_part_has_its_own_copy(self, packed: list[PackedWeight], tmp_path: Path):
        checkpoint = create_checkpoint(tmp_path / "checkpoint", num_hidden_layers=4)
        cache = WeightCache(tmp_path / "cache", max_bytes=2**30)

        def run(layout: str) -> tuple[torch.Tensor, torch.Tensor]:
            tp_size, stages = LAYOUTS[layout]
            parts = ModelParts(checkpoint, kind="cpu", weights="int8", tp_size=tp_size, stages=stages, cache=cache)
            return run_steps(parts)

        first = {layout: run(layout) for layout in LAYOUTS}
        assert packed
        packed.clear()
        for layout, expected in first.items():
            assert all(map(torch.equal, run(layout), expected))
        assert not packed
        assert sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors")) == sorted(
            f"int8-{part}.safetensors"
            for part in (
                *(f"rank{rank}of2" for rank in range(2)),
                *(f"rank{rank}of4" for rank in range(4)),
                *(f"layers{layers}" for layers in ("0to2", "2to4")),
                *(f"layers{layers}-rank{rank}of2" for layers in ("0to2", "2to4") for rank in range(2)),
            )
        )

    def test_another_ranks_copy_is_none(self, packed: list[PackedWeight], tmp_path: Path):
        """Two ranks' copies are of one size and shape: their headers tell them apart."""
        checkpoint = create_checkpoint(tmp_path / "checkpoint")
        cache = WeightCache(tmp_path / "cache", max_bytes=2**30)
        options: dict[str, Any] = {"kind": "cpu", "weights": "int8", "tp_size": 2, "cache": cache}
        expected = run_steps(ModelParts(checkpoint, **options))
        first, second = sorted((tmp_path / "cache").rglob("*.safetensors"))
        assert first.stat().st_size == second.stat().st_size
        second.write_bytes(first.read_bytes())
        packed.clear()
        assert all(map(torch.equal, run_steps(ModelParts(checkpoint, **options)), expected))
        assert packed


@compiled
@pytest.mark.parametrize("format", linear.FORMATS)
def test_rows_of_padding_are_zeros(format: linear.WeightFormat, tmp_path: Path):
    checkpoint = create_checkpoint(tmp_path)
    last = ModelParts(checkpoint, kind="cpu", weights=format, tp_size=4).ranks[-1]
    table = linear.unpack(last.model.model.embed_tokens.weight)
    assert table.shape == (65, 64)
    assert (table[-1] == 0).all()
    assert (table[:-1] != 0).any(dim=1).all()


def test_a_tensor_that_is_missing_stops_every_rank(tmp_path: Path):
    """Not only the one that would hold it: half a group must not start."""
    checkpoint = create_checkpoint(tmp_path, num_hidden_layers=2, max_shard_size="20KB")
    (checkpoint / "config.json").write_text(
        (checkpoint / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\."):
        ModelParts(checkpoint, stages=[(0, 1)])
