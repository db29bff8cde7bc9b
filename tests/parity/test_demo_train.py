"""What training writes: a directory that others may read and load, and a card that says how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from cluster.demo.train import build_model, save

RESULT: dict[str, Any] = {
    "size": "draft",
    "parameters": 1_000_000,
    "train_bytes": 10_000_000,
    "held_out_bytes": 500_000,
    "train_tokens_seen": 3_000_000,
    "epochs": 1.5,
    "steps": 77,
    "minutes": 2.5,
    "device": "cpu",
    "threads": 1,
    "python": "3.11.0",
    "held_out_bits_per_byte": 1.25,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    out = tmp_path / "made" / "draft"
    save(build_model("draft"), Tokenizer(models.BPE()), RESULT, out)
    return out


def test_everybody_may_read_every_file(saved: Path) -> None:
    modes = {file.name: file.stat().st_mode & 0o777 for file in saved.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(modes)
    assert set(modes.values()) == {0o644}


def test_the_card_has_the_command_that_made_it(saved: Path) -> None:
    assert f"python -m cluster.demo.train --size draft --out {saved}`" in (saved / "README.md").read_text()


def test_the_model_loads_with_its_weights(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    assert model.dtype == torch.bfloat16
    torch.manual_seed(0)
    expected = build_model("draft").to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
