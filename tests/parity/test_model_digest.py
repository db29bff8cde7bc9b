"""Which model it is, told by files that may lie anywhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import create_checkpoint
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError
from cluster.models import model_digest as digests
from cluster.models.model_digest import model_digest


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint(tmp_path_factory.mktemp("digest") / "original")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def change_weights(checkpoint: Path, names: list[str], change: float) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    for name in names:
        tensors[name] = tensors[name] + change
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_copy_is_the_same_whatever_its_times(original: Path, checkpoint: Path):
    os.utime(checkpoint / "model.safetensors", (0, 0))
    assert model_digest(checkpoint) == model_digest(original)


def test_so_is_one_in_several_files(original: Path, tmp_path: Path):
    parts = create_checkpoint(tmp_path / "parts", max_shard_size="100KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    shutil.copy(original / "config.json", parts / "config.json")
    assert model_digest(parts) == model_digest(original)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_any_one_matrix_that_was_trained_on_tells_it_apart(original: Path, checkpoint: Path, name: str):
    change_weights(checkpoint, [name], 0.01)
    assert model_digest(checkpoint) != model_digest(original)


def test_so_do_a_type_and_the_configuration(original: Path, checkpoint: Path, tmp_path: Path):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert model_digest(checkpoint) != model_digest(original)
    assert model_digest(checkpoint, with_weights=False) != model_digest(original, with_weights=False)
    other = create_checkpoint(tmp_path / "bfloat16", dtype=torch.bfloat16)
    shutil.copy(original / "config.json", other / "config.json")
    assert model_digest(other) != model_digest(original)


def test_of_many_tensors_some_are_looked_at(original: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digests, "_MAX_SAMPLES", 8)
    before = model_digest(checkpoint)
    assert before == model_digest(original)
    change_weights(checkpoint, list(load_file(checkpoint / "model.safetensors")), 0.01)
    assert model_digest(checkpoint) != before


def test_made_up_weights_need_no_files(original: Path, checkpoint: Path):
    (checkpoint / "model.safetensors").unlink()
    assert model_digest(checkpoint, with_weights=False) == model_digest(original, with_weights=False)
    with pytest.raises(CheckpointError, match="has no weights"):
        model_digest(checkpoint)
