"""What int8 and int4 weights cost in held-out bits per byte of the embedded model; on a slice of the held-out files, on
all of them under CLUSTER_TEST_FULL=1."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cluster.checkpoint import resolve_checkpoint
from cluster.demo.evaluate import Scorer, bits_per_byte, held_out_documents
from cluster.errors import ConfigError
from cluster.kernels.cpu.library import library
from cluster.kernels.cpu.linear import PackedWeight
from cluster.worker.config import WorkerConfig

compiled = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
NUM_BYTES = None if os.environ.get("CLUSTER_TEST_FULL") == "1" else 60_000
DEMO = resolve_checkpoint("demo")
MOST = {"bfloat16": 0.0005, "int8": 0.005, "int4": 0.03}  # of the bits per byte of float32


def measure(weights: str) -> float:
    documents, num_bytes = held_out_documents(DEMO, NUM_BYTES)
    return bits_per_byte(Scorer(DEMO, WorkerConfig(device="cpu", weights=weights)), documents, num_bytes)


@pytest.fixture(scope="module")
def float32() -> float:
    return measure("float32")


@compiled
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("weights", MOST)
def test_bits_per_byte_beside_float32(weights: str, float32: float):
    assert abs(measure(weights) / float32 - 1) <= MOST[weights]


@compiled
@pytest.mark.timeout(600)
def test_weights_of_three_bits_are_seen(float32: float, monkeypatch: pytest.MonkeyPatch):
    """Negative control: int4's bar is one that the next coarser grid of the same groups does not reach."""
    pack_rows = PackedWeight.pack_rows

    def coarse(weight: PackedWeight, first_row: int, rows_OI: torch.Tensor) -> None:
        if weight.format == "int4":
            groups = rows_OI.float().unflatten(1, (-1, weight.group_size))
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            step = (high - low).clamp(min=1e-12) / 7
            rows_OI = (((groups - low) / step).round() * step + low).flatten(1)
        pack_rows(weight, first_row, rows_OI)

    monkeypatch.setattr(PackedWeight, "pack_rows", coarse)
    assert measure("int4") / float32 - 1 > MOST["int4"]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_torchs_kernels_have_no_quantized_weights(weights: str):
    with pytest.raises(ConfigError, match=r"worker\.kernels is torch") as caught:
        Scorer(Path(DEMO), WorkerConfig(device="cpu", kernels="torch", weights=weights))
    assert caught.value.field == "worker.weights"
