"""float32 weights that come as bfloat16 take half the memory and change no bit of a result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import create_checkpoint
from safetensors.torch import load_file, save_file

from cluster import kernels
from cluster.kernels.cpu.library import library
from cluster.llm import LLM, SamplingParams
from cluster.models.config import ConfigFile
from cluster.models.loader import LoadOptions, ModelLoader

pytestmark = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")


def num_bytes(checkpoint: Path) -> int:
    backend = kernels.backend("cpu")
    assert backend is not None
    options = LoadOptions(backend=backend, weights="float32", dtype=torch.float32, device=torch.device("cpu"))
    return ModelLoader(checkpoint, ConfigFile.read(checkpoint / "config.json"), options).num_bytes


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The same numbers stored as bfloat16 and as float32, and with one tensor of the former in float32."""
    folders = [tmp_path_factory.mktemp(name) for name in ("narrow", "wide", "mixed")]
    for folder in folders:
        create_checkpoint(folder, "Qwen2ForCausalLM", dtype=torch.bfloat16, tokenizer=True)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for index, name in enumerate(sorted(tensors)):
            if folder is folders[1] or (folder is folders[2] and index == 0):
                tensors[name] = tensors[name].float()
        save_file(tensors, file, metadata={"format": "pt"})
    return folders[0], folders[1], folders[2]


def test_bfloat16_tensors_stay_so(stored: tuple[Path, Path, Path]):
    narrow, wide, mixed = map(num_bytes, stored)
    assert narrow < 0.55 * wide
    assert mixed == wide


def test_every_bit_is_equal(stored: tuple[Path, Path, Path]):
    outputs = []
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=7, logprobs=5, ignore_eos=True)
    for checkpoint in stored[:2]:
        with LLM(checkpoint, device="cpu", weights="float32", num_threads=1) as llm:
            assert llm.model.weights == "float32"
            outputs.append([o.outputs for o in llm.generate([[5, 6, 7], list(range(3, 80))], sampling)])
    assert outputs[0] == outputs[1]
