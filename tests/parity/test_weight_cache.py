"""Quantized copies on disk: found again, told from others, made anew where they are broken, and bounded in size."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import create_checkpoint
from parity_runs import create_engine, create_prompts, run_engine
from safetensors import safe_open

from cluster.kernels.cpu import linear
from cluster.kernels.cpu.library import library
from cluster.kernels.cpu.linear import PackedWeight
from cluster.models import weight_cache
from cluster.models.weight_cache import CacheKey, WeightCache, checkpoint_digest

compiled = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
PROMPTS = create_prompts((5, 33))
HEADER = b"\x08\0\0\0\0\0\0\0{}      "


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return create_checkpoint(tmp_path / "checkpoint", "Qwen2ForCausalLM")


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[PackedWeight]:
    """The matrices that are packed from here on."""
    seen: list[PackedWeight] = []
    pack_rows = PackedWeight.pack_rows

    def noting(weight: PackedWeight, first_row: int, rows_OI: torch.Tensor) -> None:
        seen.append(weight)
        pack_rows(weight, first_row, rows_OI)

    monkeypatch.setattr(PackedWeight, "pack_rows", noting)
    return seen


def run(checkpoint: Path, directory: Path, weights: str = "int8", **options: Any):
    engine = create_engine(checkpoint, weights=weights, weight_cache_dir=str(directory), **options)
    return run_engine(engine, PROMPTS)


def copies(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def fill(cache: WeightCache, name: str, *, num_bytes: int = 1000, used_s: float | None = None) -> CacheKey:
    key = CacheKey(name, "int8")
    cache.write(key, HEADER, torch.full((num_bytes,), 7, dtype=torch.uint8))
    if used_s is not None:
        os.utime(cache.path(key), (used_s, used_s))
    return key


def is_kept(cache: WeightCache, key: CacheKey, num_bytes: int = 1000) -> bool:
    data = torch.zeros(num_bytes, dtype=torch.uint8)
    found = cache.read(key, HEADER, data, num_threads=2)
    assert torch.equal(data, torch.full_like(data, 7 if found else 0))
    return found


@compiled
class TestModel:
    @pytest.mark.parametrize("weights", ["int8", "int4"])
    def test_the_second_start_packs_nothing_and_says_the_same(
        self, checkpoint: Path, tmp_path: Path, packed: list[PackedWeight], weights: str
    ):
        expected = run(checkpoint, tmp_path / "cache", weights)
        assert packed
        packed.clear()
        assert run(checkpoint, tmp_path / "cache", weights) == expected
        assert not packed
        assert len(copies(tmp_path / "cache")) == 1

    def test_float_weights_are_not_copied(self, checkpoint: Path, tmp_path: Path):
        run(checkpoint, tmp_path / "cache", "bfloat16")
        assert not (tmp_path / "cache").exists()

    def test_a_copy_is_a_safetensors_file(self, checkpoint: Path, tmp_path: Path):
        run(checkpoint, tmp_path / "cache")
        (copy,) = copies(tmp_path / "cache")
        with safe_open(copy, framework="pt") as tensors:
            assert tensors.metadata()["weights"] == "int8"
            assert "model.layers.0.self_attn.qkv_proj.weight" in tensors.keys()  # noqa: SIM118

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.write_bytes(path.read_bytes()[:-64]),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(path.read_bytes().replace(b'"weights":"int8"', b'"weights":"int9"')),
            lambda path: path.write_bytes(b"\0" * path.stat().st_size),
        ],
        ids=["cut", "empty", "another header", "zeros"],
    )
    def test_a_broken_copy_is_made_anew(
        self,
        checkpoint: Path,
        tmp_path: Path,
        packed: list[PackedWeight],
        damage: Callable[[Path], Any],
        caplog: pytest.LogCaptureFixture,
    ):
        expected = run(checkpoint, tmp_path / "cache")
        (copy,) = copies(tmp_path / "cache")
        whole = copy.read_bytes()
        damage(copy)
        packed.clear()
        assert run(checkpoint, tmp_path / "cache") == expected
        assert packed
        assert copy.read_bytes() == whole
        assert "made anew" in caplog.text

    def test_a_copy_of_other_groups_is_made_anew(
        self, checkpoint: Path, tmp_path: Path, packed: list[PackedWeight], monkeypatch: pytest.MonkeyPatch
    ):
        """Where groups divide the inputs, int8 takes the same bytes in groups of any size."""
        expected = run(checkpoint, tmp_path / "cache")
        packed.clear()
        monkeypatch.setattr(linear, "default_group_size", lambda format, in_features: 16)
        run(checkpoint, tmp_path / "cache")
        assert {weight.group_size for weight in packed} == {16}
        monkeypatch.undo()
        assert run(checkpoint, tmp_path / "cache") == expected

    def test_another_checkpoint_of_the_same_shape_has_its_own(self, checkpoint: Path, tmp_path: Path):
        other = create_checkpoint(tmp_path / "other", "Qwen2ForCausalLM", seed=1)
        first, second = run(checkpoint, tmp_path / "cache"), run(other, tmp_path / "cache")
        assert first != second
        assert run(checkpoint, tmp_path / "cache") == first
        assert len(copies(tmp_path / "cache")) == 2

    def test_a_directory_that_cannot_be_made_stops_nothing(
        self, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        (tmp_path / "file").write_text("in the way")
        assert run(checkpoint, tmp_path / "file") == run(checkpoint, tmp_path / "cache")
        assert "not cached" in caplog.text

    def test_random_weights_need_no_weight_files_and_leave_no_copy(self, checkpoint: Path, tmp_path: Path):
        (checkpoint / "model.safetensors").unlink()
        outputs = run(checkpoint, tmp_path / "cache", load_format="dummy")
        assert [len(output) for output in outputs] == [64, 64]
        assert run(checkpoint, tmp_path / "cache", load_format="dummy") == outputs
        assert not (tmp_path / "cache").exists()


@compiled
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_copy_serves_machines_of_every_instruction_set(format: str):
    """Or it would have to be named after one."""
    torch.manual_seed(0)
    weight_OI = torch.randn(100, 224)
    expected = linear.pack(weight_OI, format)
    for isa in library().available():
        packed = PackedWeight.empty(format, 100, 224)
        functions = linear._bind(library().with_isa(isa), format)
        functions.pack(weight_OI.data_ptr(), 100, 224, 100, packed.group_size, 0, packed.data.data_ptr())
        assert torch.equal(packed.data, expected.data), isa


class TestDigest:
    def test_a_copy_of_the_files_with_their_times_is_the_same(self, checkpoint: Path, tmp_path: Path):
        copy = shutil.copytree(checkpoint, tmp_path / "copy")
        assert checkpoint_digest(copy) == checkpoint_digest(checkpoint)

    def test_one_changed_number_is_told_by_the_time(self, checkpoint: Path):
        file, before = checkpoint / "model.safetensors", checkpoint_digest(checkpoint)
        data, status = bytearray(file.read_bytes()), file.stat()
        data[-3] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert checkpoint_digest(checkpoint) != before

    def test_other_numbers_are_told_where_times_are_all_alike(self, checkpoint: Path, tmp_path: Path):
        other = create_checkpoint(tmp_path / "other", "Qwen2ForCausalLM", seed=1)
        for directory in (checkpoint, other):
            os.utime(directory / "model.safetensors", (0, 0))
        assert checkpoint_digest(other) != checkpoint_digest(checkpoint)

    def test_the_configuration_is_no_part_of_it(self, checkpoint: Path):
        """What of it shapes the weights is in the copy's header."""
        before = checkpoint_digest(checkpoint)
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        assert checkpoint_digest(checkpoint) == before


class TestRoom:
    def test_those_used_longest_ago_make_room(self, tmp_path: Path):
        cache = WeightCache(tmp_path, max_bytes=3 * (1000 + len(HEADER)))
        oldest, second, newest = (fill(cache, name, used_s=1e9 + age) for age, name in enumerate("abc"))
        assert is_kept(cache, oldest)  # and has been used now
        fourth = fill(cache, "d")
        assert [is_kept(cache, key) for key in (oldest, second, newest, fourth)] == [True, False, True, True]

    def test_what_is_larger_than_all_of_it_is_not_kept_and_removes_nothing(self, tmp_path: Path):
        cache = WeightCache(tmp_path, max_bytes=1500)
        small, large = fill(cache, "small"), fill(cache, "large", num_bytes=2000)
        assert is_kept(cache, small)
        assert not is_kept(cache, large, 2000)

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
        cache = WeightCache(tmp_path, max_bytes=2**40)
        monkeypatch.setattr(weight_cache, "_DISK_RESERVE_BYTES", 2**62)
        assert not is_kept(cache, fill(cache, "a"))
        assert "no room" in caplog.text
        assert copies(tmp_path) == []

    def test_a_write_that_fails_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        cache = WeightCache(tmp_path, max_bytes=2**40)
        monkeypatch.setattr(os, "fsync", full)
        assert not is_kept(cache, fill(cache, "a"))
        assert "No space left" in caplog.text
        assert copies(tmp_path) == []

    def test_half_copies_of_killed_processes_are_removed_after_an_hour(self, tmp_path: Path):
        cache = WeightCache(tmp_path, max_bytes=2**40)
        fill(cache, "a")
        old, fresh = tmp_path / "a" / ".int8.old.part", tmp_path / "a" / ".int8.new.part"
        for path in (old, fresh):
            path.write_bytes(b"half")
        os.utime(old, (1e9, 1e9))
        fill(cache, "b")
        assert (old.exists(), fresh.exists()) == (False, True)

    def test_reading_says_nothing_where_there_is_no_copy(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO)
        assert not is_kept(WeightCache(tmp_path / "none", max_bytes=1), CacheKey("a", "int8"))
        assert not caplog.records
